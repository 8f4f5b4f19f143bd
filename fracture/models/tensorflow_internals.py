"""The private interfaces of TensorFlow that this program uses, all of them; `tests/models` names the version."""

# Raised by `TFLiteConverter.convert`, which no public module exports. Any other exception there is a bug, and must not
# be reported as an operation that TFLite does not have.
from tensorflow.lite.python.convert import ConverterError

# Makes the weights of a function constants. Without it the converter traces each layer of the model anew, which takes
# longer than all else.
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

# A variable without a value, for the shapes of a network whose weights would not fit in memory. A graph of its own
# would do without, but building Keras models in one breaks those that were built before.
from tensorflow.python.ops.resource_variable_ops import UninitializedVariable

__all__ = ["ConverterError", "UninitializedVariable", "convert_variables_to_constants_v2"]
