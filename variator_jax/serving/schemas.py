"""Requests and answers of the HTTP API: OpenAI's, Text Embeddings Inference's (TEI), Cohere's.

Fields that those APIs do not have are ours, all optional: `Choice`. Unknown fields are ignored, as
those servers do. Types are strict: `"1"` is no number. Lists are bounded, and their first wrong
item ends their validation, so that no body makes an error an item.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from variator_jax.serving.tasks import Cut

#: Inputs of one request, whether in a list or a query's documents.
MOST_TEXTS = 2048
#: Token ids of one input, which is then cut or refused.
MOST_IDS = 1 << 15


def _unicode(text: str) -> str:
    """JSON can spell half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        reason = f"Half a surrogate pair at character {error.start}"
        raise PydanticCustomError("not_unicode", "{reason}", {"reason": reason}) from error
    return text


AnyText = Annotated[str, AfterValidator(_unicode)]
Text = Annotated[AnyText, Field(min_length=1)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Id], Field(fail_fast=True, min_length=1, max_length=MOST_IDS)]
OneOrTwo = Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=2)]
Pair = Annotated[list[Text], Field(fail_fast=True, min_length=2, max_length=2)]
_Item = TypeVar("_Item")
Inputs = Annotated[list[_Item], Field(fail_fast=True, min_length=1, max_length=MOST_TEXTS)]
Texts = Inputs[Text]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class Choice(_Strict):
    """Which task and which plugin answer; by default the first task of the kind, and the policy.

    And what happens to a text that is too long.

    Attributes:
      task: a configured task's name.
      plugin: a plugin's name, 'none' for ratio 1.
      ratio: in place of a name, the ratio of a plugin; 1 for none.
      max_ratio: the policy chooses no ratio above this one.
      truncate: whether a text above the longest length is cut; else it is refused.
      truncation_direction: the side on which a cut text loses tokens.
    """

    task: str | None = None
    plugin: str | None = None
    ratio: Annotated[int, Field(ge=1)] | None = None
    max_ratio: Annotated[int, Field(ge=1)] | None = None
    truncate: bool | None = None
    truncation_direction: Literal["Right", "Left", "right", "left"] = "Right"

    def cut(self, longest: int) -> Cut:
        """What becomes of inputs of more tokens than `longest`."""
        return Cut(longest, bool(self.truncate), self.truncation_direction.lower() == "left")


# OpenAI.


class EmbeddingsRequest(Choice):
    """POST /v1/embeddings. `model` is not checked: one server has one backbone."""

    input: Text | Texts | Ids | Inputs[Ids]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None  # LiteLLM sends null
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


class Embedding(BaseModel):
    """One vector, as numbers or as base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens before padding."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """The answer of /v1/embeddings."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class Model(BaseModel):
    """The one model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "variator"


class ModelList(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class OpenAiErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAiError(BaseModel):
    """OpenAI's form of an error."""

    error: OpenAiErrorBody


# Text Embeddings Inference.


class TokensRequest(Choice):
    """POST /embed_all: a vector for each token. TEI's `prompt_name` is the name of a task."""

    inputs: Text | Ids | Inputs[Text | Ids]
    prompt_name: str | None = None


class EmbedRequest(TokensRequest):
    """POST /embed."""

    normalize: bool = True
    dimensions: Annotated[int, Field(ge=1)] | None = None


class RerankRequest(Choice):
    """POST /rerank, in TEI's form."""

    query: Text
    texts: Inputs[AnyText]
    raw_scores: bool = False
    return_text: bool = False


class Rank(BaseModel):
    """The score of one text."""

    index: int
    score: float
    text: str | None = None


class PredictRequest(Choice):
    """POST /predict: a text, a pair of texts, or a list whose members are lists of those."""

    inputs: Text | OneOrTwo | Inputs[OneOrTwo]
    raw_scores: bool = False


class Prediction(BaseModel):
    """A label and its probability."""

    label: str
    score: float


class TokenizeRequest(_Strict):
    """POST /tokenize."""

    inputs: Text | Texts
    add_special_tokens: bool = True


class Token(BaseModel):
    """One token. Where it lies in the text is not known."""

    id: int
    text: str
    special: bool
    start: int | None = None
    stop: int | None = None


class TeiError(BaseModel):
    """TEI's form of an error."""

    error: str
    error_type: str


# Cohere and Jina.


class Document(_Strict):
    """A document with its text in a field."""

    text: AnyText


class DocumentsRequest(Choice):
    """POST /v1/rerank and /v2/rerank. Documents that are too long are cut, as Cohere does."""

    query: Text
    documents: Inputs[AnyText | Document]
    model: str | None = None
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None


class RankedDocument(BaseModel):
    """The relevance of one document."""

    index: int
    relevance_score: float
    document: Document | None = None


class RankedDocuments(BaseModel):
    """The answer of /v1/rerank: best first."""

    id: str
    model: str
    results: list[RankedDocument]
    usage: Usage
    meta: dict[str, Any]


class CohereError(BaseModel):
    """Cohere's form of an error."""

    message: str


# Ours, in the form of Text Generation Inference.


class GenerateParameters(_Strict):
    """The decoder's search, within what the task was compiled for."""

    max_new_tokens: Annotated[int, Field(ge=1)] | None = None


class GenerateRequest(Choice):
    """POST /generate: a text, or a list of texts or of pairs of texts."""

    inputs: Text | Texts | Inputs[Pair]
    parameters: GenerateParameters = GenerateParameters()


class Generated(BaseModel):
    """The text behind one input."""

    generated_text: str
