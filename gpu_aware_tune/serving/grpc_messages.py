"""The protocol's gRPC messages, made from a table: no generated code, no `.proto` file.

The numbers of the fields are those of the public standard and of Triton's extensions. The messages
live in a pool of their own, so a client library in the same process may have its own of these names.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from gpu_aware_tune.errors import UserError

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"

# message: fields "number name type", "*type" where repeated, "type|oneof" where one of several, and
# "map:type" for a map from texts. Types in capitals are other messages, or the enumeration.
_METHOD_FIELDS = "1 name string, 2 version string"
_PARAMETERS = "parameters map:InferParameter"
_TABLE = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "1 live bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "1 ready bool",
    "ModelReadyRequest": _METHOD_FIELDS,
    "ModelReadyResponse": "1 ready bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "1 name string, 2 version string, 3 extensions *string",
    "ModelMetadataRequest": _METHOD_FIELDS,
    "ModelMetadataResponse": (
        "1 name string, 2 versions *string, 3 platform string,"
        "4 inputs *ModelMetadataResponse.TensorMetadata,"
        "5 outputs *ModelMetadataResponse.TensorMetadata"
    ),
    "ModelMetadataResponse.TensorMetadata": "1 name string, 2 datatype string, 3 shape *int64",
    "InferParameter": (
        "1 bool_param bool|parameter_choice, 2 int64_param int64|parameter_choice,"
        "3 string_param string|parameter_choice, 4 double_param double|parameter_choice,"
        "5 uint64_param uint64|parameter_choice"
    ),
    "InferTensorContents": (
        "1 bool_contents *bool, 2 int_contents *int32, 3 int64_contents *int64,"
        "4 uint_contents *uint32, 5 uint64_contents *uint64, 6 fp32_contents *float,"
        "7 fp64_contents *double, 8 bytes_contents *bytes"
    ),
    "ModelInferRequest": (
        "1 model_name string, 2 model_version string, 3 id string,"
        f"4 {_PARAMETERS}, 5 inputs *ModelInferRequest.InferInputTensor,"
        "6 outputs *ModelInferRequest.InferRequestedOutputTensor, 7 raw_input_contents *bytes"
    ),
    "ModelInferRequest.InferInputTensor": (
        "1 name string, 2 datatype string, 3 shape *int64,"
        f"4 {_PARAMETERS}, 5 contents InferTensorContents"
    ),
    "ModelInferRequest.InferRequestedOutputTensor": f"1 name string, 2 {_PARAMETERS}",
    "ModelInferResponse": (
        "1 model_name string, 2 model_version string, 3 id string,"
        f"4 {_PARAMETERS}, 5 outputs *ModelInferResponse.InferOutputTensor,"
        "6 raw_output_contents *bytes"
    ),
    "ModelInferResponse.InferOutputTensor": (
        "1 name string, 2 datatype string, 3 shape *int64,"
        f"4 {_PARAMETERS}, 5 contents InferTensorContents"
    ),
    "ModelStreamInferResponse": "1 error_message string, 2 infer_response ModelInferResponse",
    "ModelConfigRequest": _METHOD_FIELDS,
    "ModelConfigResponse": "1 config ModelConfig",
    # Only what clients read of Triton's ModelConfig.
    "ModelConfig": (
        "1 name string, 2 platform string, 3 version_policy ModelVersionPolicy,"
        "4 max_batch_size int32, 5 input *ModelInput, 6 output *ModelOutput,"
        "11 dynamic_batching ModelDynamicBatching|scheduling_choice, 17 backend string,"
        "19 model_transaction_policy ModelTransactionPolicy"
    ),
    "ModelVersionPolicy": "1 latest ModelVersionPolicy.Latest|policy_choice",
    "ModelVersionPolicy.Latest": "1 num_versions uint32",
    "ModelInput": "1 name string, 2 data_type DataType, 4 dims *int64, 5 reshape ModelTensorReshape",
    "ModelOutput": "1 name string, 2 data_type DataType, 3 dims *int64, 5 reshape ModelTensorReshape",
    "ModelTensorReshape": "1 shape *int64",
    "ModelDynamicBatching": "",
    "ModelTransactionPolicy": "1 decoupled bool",
    "ModelStatisticsRequest": _METHOD_FIELDS,
    "ModelStatisticsResponse": "1 model_stats *ModelStatistics",
    "ModelStatistics": (
        "1 name string, 2 version string, 3 last_inference uint64, 4 inference_count uint64,"
        "5 execution_count uint64, 6 inference_stats InferStatistics,"
        "7 batch_stats *InferBatchStatistics"
    ),
    "InferStatistics": (
        "1 success StatisticDuration, 2 fail StatisticDuration, 3 queue StatisticDuration,"
        "4 compute_input StatisticDuration, 5 compute_infer StatisticDuration,"
        "6 compute_output StatisticDuration, 7 cache_hit StatisticDuration,"
        "8 cache_miss StatisticDuration"
    ),
    "InferBatchStatistics": (
        "1 batch_size uint64, 2 compute_input StatisticDuration,"
        "3 compute_infer StatisticDuration, 4 compute_output StatisticDuration"
    ),
    "StatisticDuration": "1 count uint64, 2 ns uint64",
    "ModelRepositoryParameter": (
        "1 bool_param bool|parameter_choice, 2 int64_param int64|parameter_choice,"
        "3 string_param string|parameter_choice, 4 bytes_param bytes|parameter_choice"
    ),
    "RepositoryIndexRequest": "1 repository_name string, 2 ready bool",
    "RepositoryIndexResponse": "1 models *RepositoryIndexResponse.ModelIndex",
    "RepositoryIndexResponse.ModelIndex": (
        "1 name string, 2 version string, 3 state string, 4 reason string"
    ),
    "RepositoryModelLoadRequest": (
        "1 repository_name string, 2 model_name string, 3 parameters map:ModelRepositoryParameter"
    ),
    "RepositoryModelLoadResponse": "",
    "RepositoryModelUnloadRequest": (
        "1 repository_name string, 2 model_name string, 3 parameters map:ModelRepositoryParameter"
    ),
    "RepositoryModelUnloadResponse": "",
    "SystemSharedMemoryStatusRequest": "1 name string",
    "SystemSharedMemoryStatusResponse": "1 regions map:SystemSharedMemoryStatusResponse.RegionStatus",
    "SystemSharedMemoryStatusResponse.RegionStatus": (
        "1 name string, 2 key string, 3 offset uint64, 4 byte_size uint64"
    ),
    "SystemSharedMemoryRegisterRequest": (
        "1 name string, 2 key string, 3 offset uint64, 4 byte_size uint64"
    ),
    "SystemSharedMemoryRegisterResponse": "",
    "SystemSharedMemoryUnregisterRequest": "1 name string",
    "SystemSharedMemoryUnregisterResponse": "",
    # There are never any of these; clients make sure of that before they register others.
    "CudaSharedMemoryStatusRequest": "1 name string",
    "CudaSharedMemoryStatusResponse": "",
    "CudaSharedMemoryUnregisterRequest": "1 name string",
    "CudaSharedMemoryUnregisterResponse": "",
}
DATA_TYPES = (
    "TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_UINT16", "TYPE_UINT32", "TYPE_UINT64",
    "TYPE_INT8", "TYPE_INT16", "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_FP64",
    "TYPE_STRING", "TYPE_BF16",
)  # fmt: skip

_Field = descriptor_pb2.FieldDescriptorProto


def _make_file() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="gpu_aware_tune/serving/v2.proto", package=PACKAGE, syntax="proto3"
    )
    enum = file.enum_type.add(name="DataType")
    for number, name in enumerate(DATA_TYPES):
        enum.value.add(name=name, number=number)
    made: dict[str, Any] = {}
    for name, fields in _TABLE.items():
        outer, _, inner = name.rpartition(".")
        message = (
            made[outer].nested_type.add(name=inner) if outer else file.message_type.add(name=name)
        )
        made[name] = message
        for field in filter(None, (text.strip() for text in fields.split(","))):
            _add_field(message, name, *field.split())
    return file


def _add_field(message: Any, owner: str, number: str, name: str, kind: str) -> None:
    kind, _, choice = kind.partition("|")
    repeated = kind.startswith(("*", "map:"))
    is_map = kind.startswith("map:")
    kind = kind.removeprefix("*").removeprefix("map:")
    if is_map:
        entry = "".join(part.capitalize() for part in name.split("_")) + "Entry"
        nested = message.nested_type.add(name=entry)
        nested.options.map_entry = True
        _add_field(nested, f"{owner}.{entry}", "1", "key", "string")
        _add_field(nested, f"{owner}.{entry}", "2", "value", kind)
        kind = f"{owner}.{entry}"
    field = message.field.add(name=name, number=int(number))
    field.label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
    if kind[0].islower():
        field.type = _Field.Type.Value(f"TYPE_{kind.upper()}")
    else:
        field.type = _Field.TYPE_ENUM if kind == "DataType" else _Field.TYPE_MESSAGE
        field.type_name = f".{PACKAGE}.{kind}"
    if choice:
        names = [one.name for one in message.oneof_decl]
        if choice not in names:
            message.oneof_decl.add(name=choice)
            names.append(choice)
        field.oneof_index = names.index(choice)


def _make_messages() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(_make_file().SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
        for name in _TABLE
    }


MESSAGES: dict[str, Any] = _make_messages()


def parse_message(name: str, data: bytes) -> Any:
    """A message from its bytes.

    Raises:
        UserError: they are not such a message.
    """
    try:
        return MESSAGES[name].FromString(data)
    except DecodeError:
        raise UserError(f"the request is not a message {PACKAGE}.{name}") from None
