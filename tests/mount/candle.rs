//! candle reads a mounted checkpoint through its shared map, as every candle program does.

use std::path::Path;

use candle_core::Device;
use candle_core::safetensors::MmapedSafetensors;

use crate::packed::{MODEL, Packed};
use crate::support::require_fuse;

/// Name, type, shape and bytes of every tensor, in the order of their names.
fn tensors(path: &Path) -> Vec<(String, candle_core::DType, Vec<usize>, Vec<u8>)> {
    // SAFETY: nobody changes the file while the test has it.
    let file = unsafe { MmapedSafetensors::new(path) }.unwrap();
    let mut tensors: Vec<_> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let tensor = file.load(&name, &Device::Cpu).unwrap();
            (name, tensor.dtype(), tensor.dims().to_vec(), view.data().to_vec())
        })
        .collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    tensors
}

#[test]
fn candle_sees_the_tensors_of_the_original() {
    require_fuse!();
    for (options, is_lossy) in [(&[][..], false), (&["--bpp", "4"][..], true)] {
        let packed = Packed::bert(options);
        packed.mount(&[]);
        let expected = packed.path("expected.safetensors");
        std::fs::write(&expected, packed.expected(is_lossy)).unwrap();
        assert_eq!(packed.model().file_name(), Some(MODEL.as_ref()));
        let (expected, mounted) = (tensors(&expected), tensors(&packed.model()));
        assert!(expected.len() > 20, "{} tensors", expected.len());
        assert!(expected == mounted, "{options:?}");
    }
}
