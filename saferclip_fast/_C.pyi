"""The native module (csrc/ops/module.cpp); absent where the package was built without a C++ compiler."""

compiler: str
