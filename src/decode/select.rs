//! Which engine a process decodes with: the fastest that the CPU has, a lower one that was asked for, or a CUDA device.

use std::sync::Arc;

use super::Engine;
use super::cpu::CpuEngine;
use super::cuda::device::Device;
use super::cuda::{CudaDevice, CudaEngine, DEFAULT_GPU_MEMORY_BYTES};
use super::reference::ReferenceEngine;

/// What was asked for. A choice may lower what the CPU could do, never raise it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum EngineChoice {
    /// The fastest this machine has.
    #[default]
    Auto,
    /// At most AVX-512 with VBMI2.
    Avx512,
    /// At most AVX2.
    Avx2,
    /// At most NEON.
    Neon,
    /// The fast engine without special instructions.
    Portable,
    /// The reference decoder.
    Reference,
    /// The first CUDA device; what it cannot decode, and all where there is none, the fastest CPU engine does.
    Cuda,
}

impl EngineChoice {
    /// The engine chosen. Logs which and why.
    pub fn engine(self) -> Arc<dyn Engine> {
        self.engine_within(DEFAULT_GPU_MEMORY_BYTES)
    }

    /// [`Self::engine`], which takes no more than `gpu_memory_bytes` of a CUDA device.
    pub fn engine_within(self, gpu_memory_bytes: u64) -> Arc<dyn Engine> {
        if self == Self::Cuda {
            return cuda_engine(gpu_memory_bytes);
        }
        match self.cpu_engine() {
            Some(engine) => Arc::new(engine),
            None => {
                log::info!("engine: reference, as asked");
                Arc::new(ReferenceEngine)
            }
        }
    }

    /// The CPU engine chosen, with a log line that says why; `None` where the reference decoder or a device is.
    pub fn cpu_engine(self) -> Option<CpuEngine> {
        let engines = cpu_engines();
        let best = engines[0];
        let asked = match self {
            Self::Avx512 => Some("avx512"),
            Self::Avx2 => Some("avx2"),
            Self::Neon => Some("neon"),
            Self::Portable => Some("portable"),
            Self::Auto => None,
            Self::Reference | Self::Cuda => return None,
        };
        let chosen = match asked {
            None => {
                log::info!("engine: {}, the fastest that this CPU has", best.name());
                best
            }
            Some(asked) => match engines.iter().find(|engine| engine.name() == asked) {
                Some(engine) => {
                    log::info!("engine: {asked}, as asked; this CPU has {}", best.name());
                    *engine
                }
                None => {
                    log::warn!("engine: {}, because this CPU has no {asked}", best.name());
                    best
                }
            },
        };
        Some(chosen)
    }
}

/// The first CUDA device's engine, or the fastest of the CPU.
fn cuda_engine(memory_bytes: u64) -> Arc<dyn Engine> {
    let cpu: Arc<dyn Engine> = Arc::new(cpu_engines()[0]);
    let device = CudaDevice::new(0).map(Arc::new);
    let name = device.as_ref().map_or_else(|_| String::new(), |device| device.name().to_owned());
    match device.and_then(|device| CudaEngine::new(device, memory_bytes, Arc::clone(&cpu))) {
        Ok(engine) => {
            log::info!("engine: cuda, as asked: {name}, {} beside it", cpu.name());
            Arc::new(engine)
        }
        Err(error) => {
            log::warn!("engine: {} instead of cuda: {error}", cpu.name());
            cpu
        }
    }
}

/// The CPU engines that this machine can run, fastest first; the portable one is always there.
pub fn cpu_engines() -> Vec<CpuEngine> {
    let mut engines = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        use super::cpu::{AVX2, AVX512};
        let has_avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("popcnt");
        let has_avx512 = has_avx2
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("avx512vbmi2")
            && is_x86_feature_detected!("gfni");
        if has_avx512 {
            // SAFETY: the CPU has just said so.
            engines.push(unsafe { CpuEngine::new(&AVX512) });
        }
        if has_avx2 {
            // SAFETY: the CPU has just said so.
            engines.push(unsafe { CpuEngine::new(&AVX2) });
        }
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: every aarch64 has NEON.
    engines.push(unsafe { CpuEngine::new(&super::cpu::NEON) });
    engines.push(CpuEngine::portable());
    engines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_portable_engine_is_always_there_and_last() {
        assert_eq!(cpu_engines().last().map(Engine::name), Some("portable"));
    }

    #[test]
    fn a_choice_gives_itself_or_what_the_cpu_has() {
        let names: Vec<_> = cpu_engines().iter().map(Engine::name).collect();
        assert_eq!(EngineChoice::Auto.engine().name(), names[0]);
        assert_eq!(EngineChoice::Portable.engine().name(), "portable");
        assert_eq!(EngineChoice::Reference.engine().name(), "reference");
        assert!(["cuda", names[0]].contains(&EngineChoice::Cuda.engine().name()), "there may be no device");
        let lowered = EngineChoice::Avx2.engine().name();
        assert!(lowered == "avx2" || (!names.contains(&"avx2") && lowered == names[0]));
    }
}
