from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class GetModelInfoRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GetModelInfoResponse(_message.Message):
    __slots__ = ("name", "weights_version", "system_fingerprint", "server_version", "parameters", "n_layer", "n_head", "n_embd", "max_context", "vocab_size", "tokenizer", "end_of_text_id", "device", "dtype", "backend", "deterministic")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    N_LAYER_FIELD_NUMBER: _ClassVar[int]
    N_HEAD_FIELD_NUMBER: _ClassVar[int]
    N_EMBD_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    END_OF_TEXT_ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    name: str
    weights_version: str
    system_fingerprint: str
    server_version: str
    parameters: int
    n_layer: int
    n_head: int
    n_embd: int
    max_context: int
    vocab_size: int
    tokenizer: str
    end_of_text_id: int
    device: str
    dtype: str
    backend: str
    deterministic: bool
    def __init__(self, name: _Optional[str] = ..., weights_version: _Optional[str] = ..., system_fingerprint: _Optional[str] = ..., server_version: _Optional[str] = ..., parameters: _Optional[int] = ..., n_layer: _Optional[int] = ..., n_head: _Optional[int] = ..., n_embd: _Optional[int] = ..., max_context: _Optional[int] = ..., vocab_size: _Optional[int] = ..., tokenizer: _Optional[str] = ..., end_of_text_id: _Optional[int] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., backend: _Optional[str] = ..., deterministic: _Optional[bool] = ...) -> None: ...

class GetServerStatusRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GetServerStatusResponse(_message.Message):
    __slots__ = ("running", "waiting", "max_slots", "max_queue", "system_fingerprint")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    MAX_SLOTS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    max_slots: int
    max_queue: int
    system_fingerprint: str
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., max_slots: _Optional[int] = ..., max_queue: _Optional[int] = ..., system_fingerprint: _Optional[str] = ...) -> None: ...
