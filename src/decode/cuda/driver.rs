//! CUDA's driver, found when it is asked for: no toolkit to build with, and no error where there is none to run with.

use std::ffi::{c_int, c_void};
use std::ptr::NonNull;
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::{CudaContext, CudaFunction, sys};
use cudarc::nvrtc::Ptx;

use super::PTX;
use super::device::{Device, DeviceError, Kernel, Launch};

/// Threads of a block: the warps that the kernel is written for.
const BLOCK_THREADS: u32 = 128;
const BLOCK_STRIPS: u32 = BLOCK_THREADS / 32;

/// The oldest devices that have what the kernel asks of a warp.
const LEAST_COMPUTE_CAPABILITY: (c_int, c_int) = (7, 0);

/// A device of CUDA's driver.
#[derive(Debug)]
pub struct CudaDevice {
    context: Arc<CudaContext>,
    name: String,
    /// In the order of [`Kernel::ALL`].
    kernels: [CudaFunction; Kernel::ALL.len()],
}

impl CudaDevice {
    /// Device `ordinal` of the driver, with the kernels compiled for it; takes some seconds the first time, when the driver
    /// does not have them in its cache.
    pub fn new(ordinal: usize) -> Result<Self, DeviceError> {
        // SAFETY: looks for a library, which has no more effect than any program that links it.
        if !unsafe { sys::is_culib_present() } {
            return Err(DeviceError::Absent("there is no CUDA driver on this machine".into()));
        }
        let absent = |error: DriverError| DeviceError::Absent(reason(error));
        let context = CudaContext::new(ordinal).map_err(absent)?;
        let name = context.name().map_err(absent)?;
        let (major, minor) = context.compute_capability().map_err(absent)?;
        if (major, minor) < LEAST_COMPUTE_CAPABILITY {
            return Err(DeviceError::Absent(format!("{name} is sm_{major}{minor}, and sm_70 is needed")));
        }
        let module =
            context.load_module(Ptx::from_src(PTX)).map_err(|error| failed(&name, "loading kernels", error))?;
        let load = |kernel: Kernel| module.load_function(kernel.name());
        let [raw, split, units, quantized, predicted, based] = Kernel::ALL.map(load);
        let kernels = (|| Ok([raw?, split?, units?, quantized?, predicted?, based?]))();
        let kernels = kernels.map_err(|error: DriverError| failed(&name, "loading kernels", error))?;
        Ok(Self { context, name, kernels })
    }

    /// Runs a driver's function with the device's context current.
    fn call<T>(
        &self,
        operation: &'static str,
        function: impl FnOnce() -> Result<T, DriverError>,
    ) -> Result<T, DeviceError> {
        let done = self.context.bind_to_thread().and_then(|()| function());
        done.map_err(|error| failed(&self.name, operation, error))
    }

    /// [`Self::call`] of an allocation.
    fn allocated<T>(&self, bytes: usize, function: impl FnOnce() -> Result<T, DriverError>) -> Result<T, DeviceError> {
        let done = self.context.bind_to_thread().and_then(|()| function());
        done.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => DeviceError::Memory { device: self.name.clone(), bytes },
            _ => failed(&self.name, "allocating", error),
        })
    }
}

fn failed(device: &str, operation: &'static str, error: DriverError) -> DeviceError {
    DeviceError::Failed { device: device.to_owned(), operation, reason: reason(error) }
}

/// A stream as the driver knows it.
fn stream(number: usize) -> sys::CUstream {
    number as sys::CUstream
}

fn reason(error: DriverError) -> String {
    let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
    text.unwrap_or_else(|_| format!("error {:?}", error.0))
}

impl Device for CudaDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn free_bytes(&self) -> Result<u64, DeviceError> {
        self.call("free memory", result::mem_get_info).map(|(free, _)| free as u64)
    }

    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError> {
        // SAFETY: nothing is asked of the arguments.
        self.allocated(bytes, || unsafe { result::malloc_sync(bytes) })
    }

    unsafe fn free(&self, address: u64, _bytes: usize) {
        // SAFETY: the caller's promise. An error tells of one that was reported before.
        let _ = self.call("freeing", || unsafe { result::free_sync(address) });
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<NonNull<u8>, DeviceError> {
        // SAFETY: nothing is asked of the arguments; what comes of them is as many bytes.
        let pointer = self.allocated(bytes, || unsafe {
            let pointer = result::malloc_host(bytes, 0)?.cast::<u8>();
            pointer.write_bytes(0, bytes);
            Ok(pointer)
        })?;
        NonNull::new(pointer).ok_or(DeviceError::Memory { device: self.name.clone(), bytes })
    }

    unsafe fn free_pinned(&self, pointer: NonNull<u8>, _bytes: usize) {
        // SAFETY: the caller's promise. An error tells of one that was reported before.
        let _ = self.call("freeing", || unsafe { result::free_host(pointer.as_ptr().cast()) });
    }

    fn new_stream(&self) -> Result<usize, DeviceError> {
        self.call("new stream", || result::stream::create(result::stream::StreamKind::NonBlocking))
            .map(|stream| stream as usize)
    }

    unsafe fn end_stream(&self, number: usize) {
        // SAFETY: the caller's promise. An error tells of one that was reported before.
        let _ = self.call("ending a stream", || unsafe { result::stream::destroy(stream(number)) });
    }

    unsafe fn upload(&self, number: usize, to: u64, from: &[u8]) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        self.call("copying to the device", || unsafe { result::memcpy_htod_async(to, from, stream(number)) })
    }

    unsafe fn download(&self, number: usize, to: &mut [u8], from: u64) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        self.call("copying from the device", || unsafe { result::memcpy_dtoh_async(to, from, stream(number)) })
    }

    unsafe fn launch(&self, number: usize, launch: Launch) -> Result<(), DeviceError> {
        let Launch { kernel, mut strips, mut count, mut statuses } = launch;
        let function = &self.kernels[kernel as usize];
        let mut arguments: [*mut c_void; 3] =
            [(&raw mut strips).cast(), (&raw mut count).cast(), (&raw mut statuses).cast()];
        let (grid, block) = ((count.div_ceil(BLOCK_STRIPS), 1, 1), (BLOCK_THREADS, 1, 1));
        // SAFETY: the arguments are the kernel's, of their types and in their order; the caller has promised the rest.
        self.call("launching", || unsafe {
            result::launch_kernel(function.cu_function(), grid, block, 0, stream(number), &mut arguments)
        })
    }

    fn synchronize(&self, number: usize) -> Result<(), DeviceError> {
        // SAFETY: a number that is no stream's is an error.
        self.call("decoding", || unsafe { result::stream::synchronize(stream(number)) })
    }
}
