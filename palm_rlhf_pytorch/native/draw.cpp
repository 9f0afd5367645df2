// Tokens drawn from logits, for Python

#include "draw.h"

extern "C" void draw(const Call* call) { draw(*call); }
extern "C" int64_t size_of_call() { return sizeof(Call); }
