"""The server's container file and Kubernetes manifest agree with the server."""

import string

import yaml
from launching import ROOT

from variator_jax.commands import serving
from variator_jax.serving.http import HttpLimits


def test_the_servers_manifest_probes_drains_and_passes_its_arguments():
    template = string.Template((ROOT / "launch" / "serve.yaml").read_text())
    values = {"NAME": "reranker", "IMAGE": "repository/image:1", "CLAIM": "models"}
    arguments = '["--backbone", "/models/monot5"]'
    text = template.safe_substitute(values, ARGUMENTS=arguments)
    deployment, service = yaml.safe_load_all(text)
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["args"] == ["--backbone", "/models/monot5"]
    assert container["livenessProbe"]["httpGet"]["path"] == "/live"
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    waits = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert waits + HttpLimits().drain_seconds < pod["terminationGracePeriodSeconds"]
    assert [variable["name"] for variable in container["env"]] == [serving.TOKEN]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    dockerfile = (ROOT / "launch" / "serve.Dockerfile").read_text()
    assert 'ENTRYPOINT ["variator", "serve", "--host", "0.0.0.0"]' in dockerfile
    [mount] = [m for m in container["volumeMounts"] if m["name"] == "cache"]
    assert f"JAX_COMPILATION_CACHE_DIR={mount['mountPath']} " in dockerfile
