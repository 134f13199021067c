//! Byte-budgeted LRU cache of decoded bytes, with single flight: a value being made is made once, whoever asks.
