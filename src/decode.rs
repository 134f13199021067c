//! Engines: decoding stages run on real hardware, all to the bits of the reference.
pub mod reference {
    //! Algorithm 1 read aloud.
}
