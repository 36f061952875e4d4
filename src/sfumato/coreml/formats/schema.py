"""The protocol buffer messages of Core ML models, as a table from which the message classes are built.

Source: the message definitions of Core ML's model format, https://apple.github.io/coremltools/mlmodel. Only what ML
Programs and pipelines need is declared; undeclared fields are preserved without being parsed. The classes are in a
separate pool, so they do not conflict with those that coremltools registers.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

__all__ = ["MODEL_KINDS", "message"]

# Kinds of model: the members of the oneof `Model.Type`. The first two are read; the others are only named in errors.
MODEL_KINDS = {
    "mlProgram": 502,
    "pipeline": 202,
    "pipelineClassifier": 200,
    "pipelineRegressor": 201,
    "glmRegressor": 300,
    "supportVectorRegressor": 301,
    "treeEnsembleRegressor": 302,
    "neuralNetworkRegressor": 303,
    "bayesianProbitRegressor": 304,
    "glmClassifier": 400,
    "supportVectorClassifier": 401,
    "treeEnsembleClassifier": 402,
    "neuralNetworkClassifier": 403,
    "kNearestNeighborsClassifier": 404,
    "neuralNetwork": 500,
    "itemSimilarityRecommender": 501,
    "customModel": 555,
    "linkedModel": 556,
    "classConfidenceThresholding": 560,
    "oneHotEncoder": 600,
    "imputer": 601,
    "featureVectorizer": 602,
    "dictVectorizer": 603,
    "scaler": 604,
    "categoricalMapping": 606,
    "normalizer": 607,
    "arrayFeatureExtractor": 609,
    "nonMaximumSuppression": 610,
    "identity": 900,
    "textClassifier": 2000,
    "wordTagger": 2001,
    "visionFeaturePrint": 2002,
    "soundAnalysisPreprocessing": 2003,
    "gazetteer": 2004,
    "wordEmbedding": 2005,
    "audioFeaturePrint": 2006,
    "serializedModel": 3000,
}

_READ_KINDS = {"mlProgram": "Program", "pipeline": "Pipeline"}

# Each field of a message is `name=number:type`, where `type*` is repeated, `<type>` a map from strings to it, `|type` a
# member of the message's oneof "kind" and `?type` one of its oneof "default". Messages that are not read are declared
# as bytes, and enumerations as integers, which have the same encoding.
_MESSAGES = {
    "ModelDescription": (
        "input=1:FeatureDescription* output=10:FeatureDescription* state=13:FeatureDescription* "
        "predictedFeatureName=11:string functions=20:FunctionDescription* defaultFunctionName=21:string "
        "metadata=100:Metadata"
    ),
    "FunctionDescription": (
        "name=1:string input=2:FeatureDescription* output=3:FeatureDescription* state=6:FeatureDescription*"
    ),
    "FeatureDescription": "name=1:string shortDescription=2:string type=3:FeatureType",
    "FeatureType": (
        "int64Type=1:|bytes doubleType=2:|bytes stringType=3:|bytes imageType=4:|ImageFeatureType "
        "multiArrayType=5:|ArrayFeatureType dictionaryType=6:|bytes sequenceType=7:|bytes stateType=8:|bytes "
        "isOptional=1000:bool"
    ),
    "ArrayFeatureType": "shape=1:int64* dataType=2:int32 enumeratedShapes=21:|EnumeratedShapes "
    "shapeRange=31:|ShapeRange intDefaultValue=41:?int32 floatDefaultValue=51:?float doubleDefaultValue=61:?double",
    "ImageFeatureType": "width=1:int64 height=2:int64 colorSpace=3:int32 enumeratedSizes=21:|EnumeratedImageSizes "
    "imageSizeRange=31:|ImageSizeRange",
    "EnumeratedImageSizes": "sizes=1:ImageSize*",
    "ImageSize": "width=1:uint64 height=2:uint64",
    "ImageSizeRange": "widthRange=1:SizeRange heightRange=2:SizeRange",
    "EnumeratedShapes": "shapes=1:Shape*",
    "Shape": "shape=1:int64*",
    "ShapeRange": "sizeRanges=1:SizeRange*",
    "SizeRange": "lowerBound=1:uint64 upperBound=2:int64",
    "Metadata": "shortDescription=1:string versionString=2:string author=3:string license=4:string "
    "userDefined=100:Entry*",
    # A map of strings, declared as pairs so that the order can be chosen.
    "Entry": "key=1:string value=2:string",
    "Pipeline": "models=1:Model* names=2:string*",
    "Program": "version=1:int64 functions=2:<Function> docString=3:string attributes=4:<Value>",
    "Function": "inputs=1:NamedValueType* opset=2:string block_specializations=3:<Block> attributes=4:<Value>",
    "Block": "inputs=1:NamedValueType* outputs=2:string* operations=3:Operation* attributes=4:<Value>",
    "Operation": "type=1:string inputs=2:<Argument> outputs=3:NamedValueType* blocks=4:Block* attributes=5:<Value>",
    "Argument": "arguments=1:Binding*",
    "Binding": "name=1:|string value=2:|Value",
    "NamedValueType": "name=1:string type=2:ValueType",
    "ValueType": "tensorType=1:|TensorType listType=2:|bytes tupleType=3:|bytes dictionaryType=4:|bytes "
    "stateType=5:|bytes",
    "TensorType": "dataType=1:int32 rank=2:int64 dimensions=3:Dimension* attributes=4:<Value>",
    "Dimension": "constant=1:|ConstantDimension unknown=2:|UnknownDimension",
    "ConstantDimension": "size=1:uint64",
    "UnknownDimension": "variadic=1:bool",
    "Value": "docString=1:string type=2:ValueType immediateValue=3:|ImmediateValue blobFileValue=5:|BlobFileValue",
    "ImmediateValue": "tensor=1:|TensorValue tuple=2:|bytes list=3:|bytes dictionary=4:|bytes",
    "BlobFileValue": "fileName=1:string offset=2:uint64",
    "TensorValue": "floats=1:|Floats ints=2:|Ints bools=3:|Bools strings=4:|Strings longInts=5:|LongInts "
    "doubles=6:|Doubles bytes=7:|Bytes",
    "Floats": "values=1:float*",
    "Ints": "values=1:int32*",
    "Bools": "values=1:bool*",
    "Strings": "values=1:string*",
    "LongInts": "values=1:int64*",
    "Doubles": "values=1:double*",
    "Bytes": "values=1:bytes",
    "Model": "specificationVersion=1:int32 description=2:ModelDescription isUpdatable=10:bool "
    + " ".join(f"{kind}={number}:|{_READ_KINDS.get(kind, 'bytes')}" for kind, number in MODEL_KINDS.items()),
}

_SCALARS = {
    "double": FieldDescriptorProto.TYPE_DOUBLE,
    "float": FieldDescriptorProto.TYPE_FLOAT,
    "int64": FieldDescriptorProto.TYPE_INT64,
    "uint64": FieldDescriptorProto.TYPE_UINT64,
    "int32": FieldDescriptorProto.TYPE_INT32,
    "bool": FieldDescriptorProto.TYPE_BOOL,
    "string": FieldDescriptorProto.TYPE_STRING,
    "bytes": FieldDescriptorProto.TYPE_BYTES,
}
_PACKAGE = "sfumato.coreml"
_ONEOFS = {"|": "kind", "?": "default"}


def message(name: str) -> Any:
    """Create an empty message, such as "Model". Its class is created at run time, so type checkers do not know it."""
    return _CLASSES[name]()


def _descriptor(name: str, fields: str) -> DescriptorProto:
    made = DescriptorProto(name=name)
    for text in fields.split():
        label, _, rest = text.partition("=")
        number, _, kind = rest.partition(":")
        _add_field(made, label, int(number), kind)
    return made


def _add_field(to: DescriptorProto, name: str, number: int, kind: str) -> None:
    field = to.field.add(name=name, number=number, label=FieldDescriptorProto.LABEL_OPTIONAL)
    if kind[0] in _ONEOFS:
        oneofs = [one.name for one in to.oneof_decl]
        if _ONEOFS[kind[0]] not in oneofs:
            to.oneof_decl.add(name=_ONEOFS[kind[0]])
            oneofs.append(_ONEOFS[kind[0]])
        field.oneof_index = oneofs.index(_ONEOFS[kind[0]])
        kind = kind[1:]
    elif kind[0] == "<":
        # A map is stored as pairs, whose message must be named after the field.
        entry = to.nested_type.add(name="".join(part[0].upper() + part[1:] for part in name.split("_")) + "Entry")
        entry.options.map_entry = True
        _add_field(entry, "key", 1, "string")
        _add_field(entry, "value", 2, kind[1:-1])
        kind = f"{to.name}.{entry.name}*"
    if kind.endswith("*"):
        field.label = FieldDescriptorProto.LABEL_REPEATED
        kind = kind[:-1]
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"


def _classes() -> dict[str, Any]:
    made = FileDescriptorProto(name="sfumato/coreml.proto", package=_PACKAGE, syntax="proto3")
    made.message_type.extend(_descriptor(name, fields) for name, fields in _MESSAGES.items())
    pool = DescriptorPool()
    pool.Add(made)
    return {name: GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES}


_CLASSES = _classes()
