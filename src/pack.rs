//! The offline encoder: alignment, mode decision, quantization, entropy coding, rate control.
//!
//! [`encode`] is Algorithm 1's upper half over a whole checkpoint. It uses the decoder's own engine for its local decode loop
//! and never repeats it.
//!
//! A tensor's way: a [`treatment`] from the tensor and the user's rules ([`options`], [`mod@keep`]), as fine as the model's
//! [`sensitivity`] asks where there is [`calibration`]; a sample of it in the [`survey`], on which step and tables are found
//! ([`entropy_model`], [`counting`], [`rate`]); its record encoded ([`record`], [`mode_decision`], [`align`]), its weights moved
//! by what [`train`] says to those before it, or coded as a [`difference`] to its [`mod@base`] and a product of [`low_rank`],
//! strip by strip ([`mod@part`], [`symbols`]), as an earlier variant was where a [`mod@profile`] is given; and what it came
//! to in the [`report`], which also has what the decoded model says beside the original where there is data for an
//! [`mod@evaluation`].

pub mod align;
pub mod base;
pub mod calibration;
pub mod columns;
pub mod counting;
pub mod difference;
pub mod encode;
pub mod entropy_model;
pub mod evaluation;
pub mod histogram;
pub mod keep;
pub mod lossless;
pub mod low_rank;
pub mod mode_decision;
pub mod motion_vectors;
pub mod network;
pub mod options;
pub mod part;
pub mod profile;
pub mod quantize;
pub mod quantized_symbols;
pub mod rate;
pub mod record;
pub mod report;
pub mod sensitivity;
pub mod source;
pub mod split_symbols;
pub mod statistics;
pub mod survey;
pub mod symbols;
pub mod train;
pub mod treatment;
pub mod trellis_search;
pub mod unit_symbols;
pub mod vectors;
pub mod zoo;
