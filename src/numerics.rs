//! Bit-exact rounding and single-operation arithmetic that every engine repeats.
