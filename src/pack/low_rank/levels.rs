//! Work that is compiled for several instruction sets. Its results are the same on all of them: compilers vectorize loops
//! over numbers that do not depend on one another, and fuse nothing.

/// Work on numbers.
pub trait Work {
    /// Does it. Written `#[inline(always)]`, so that it is compiled for the instructions of who calls it.
    fn run(self);
}

/// Does work with the best instructions that the CPU has.
pub fn run<W: Work>(work: W) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            // SAFETY: the CPU has the instructions.
            return unsafe { with_avx512(work) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has the instructions.
            return unsafe { with_avx2(work) };
        }
    }
    work.run();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx2")]
fn with_avx512<W: Work>(work: W) {
    work.run();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn with_avx2<W: Work>(work: W) {
    work.run();
}
