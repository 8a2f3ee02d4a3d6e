import jax

from variator_jax.bench import hardware as module


def test_the_name_holds_device_and_version():
    name = module.hardware()
    assert f"jax {jax.__version__}" in name
    if jax.devices()[0].platform == "cpu":
        assert name.startswith("CPU ") and " core" in name
    else:
        assert jax.devices()[0].device_kind in name


def test_an_accelerator_is_named_by_kind_and_number(monkeypatch):
    class Device:
        platform, device_kind = "gpu", "Imaginary G1"

    monkeypatch.setattr(jax, "devices", lambda: [Device(), Device()])
    assert module.hardware().startswith("2 x Imaginary G1 (gpu), jax ")


def test_the_cpu_model_is_the_first_of_cpuinfo(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Imaginary C2\nmodel name\t: Other\n")
    assert module._cpu_model(cpuinfo) == "CPU Imaginary C2"


def test_a_machine_without_cpuinfo_still_has_a_name(tmp_path):
    assert len(module._cpu_model(tmp_path / "none")) > len("CPU ")


def test_cpu_devices_that_were_forced_are_told(monkeypatch):
    class Device:
        platform, device_kind = "cpu", "cpu"

    monkeypatch.setattr(jax, "devices", lambda: [Device()] * 8)
    assert "shown to JAX as 8 devices" in module.hardware()
