//! The `.mcwc` archive as bytes: `SPEC.md` beside this room is normative. Nothing is computed here.
