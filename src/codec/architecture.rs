//! Architecture rules as data.
