//! Whether CUDA is complete on this machine.
//!
//! Owns [`probe`], which must pass before any CUDA code runs: the backend panics where a driver or the run-time compiler
//! is missing. A probe only opens libraries and counts devices; it allocates nothing on them.

use std::{
    ffi::{CStr, c_int, c_uint, c_void},
    path::{Path, PathBuf},
};

const DRIVERS: [&CStr; 2] = [c"libcuda.so", c"libcuda.so.1"];
const COMPILERS: [&CStr; 3] = [c"libnvrtc.so", c"libnvrtc.so.12", c"libnvrtc.so.11"];
/// A header the generated kernels include.
const HEADER: &str = "include/cuda_fp16.h";

/// Driver, device, run-time compiler and headers: what is missing, in words.
pub fn probe(device: usize) -> Result<(), String> {
    let driver = Library::open(&DRIVERS).ok_or("no NVIDIA driver (libcuda.so) is installed")?;
    let count = driver.device_count()?;
    if device >= count {
        return Err(format!("the driver sees {count} device(s)"));
    }
    Library::open(&COMPILERS).ok_or("the CUDA run-time compiler (libnvrtc.so) is not installed")?;
    let root = toolkit().ok_or("the CUDA headers are not installed (CUDA_PATH is not set)")?;
    match root.join(HEADER).is_file() {
        true => Ok(()),
        false => Err(format!("there is no {HEADER} in {}", root.display())),
    }
}

/// Where the backend will look for headers.
fn toolkit() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("CUDA_PATH") {
        return Some(path.into());
    }
    let usual = ["/usr/local/cuda", "/opt/cuda"].map(Path::new).into_iter().find(|path| path.exists());
    let distribution = || Path::new("/usr/bin/nvcc").exists().then_some(Path::new("/usr"));
    usual.or_else(distribution).map(Path::to_owned)
}

/// An open shared library. Never closed: the backend opens the same ones for the life of the process.
struct Library(*mut c_void);

impl Library {
    fn open(names: &[&CStr]) -> Option<Self> {
        names.iter().find_map(|name| {
            // SAFETY: a valid string; these libraries' initialisers have no preconditions.
            let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY) };
            (!handle.is_null()).then_some(Self(handle))
        })
    }

    fn symbol(&self, name: &CStr) -> Result<*mut c_void, String> {
        // SAFETY: a live handle and a valid string.
        let address = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        match address.is_null() {
            true => Err(format!("the NVIDIA driver lacks {}", name.to_string_lossy())),
            false => Ok(address),
        }
    }

    fn device_count(&self) -> Result<usize, String> {
        type Init = unsafe extern "C" fn(c_uint) -> c_int;
        type Count = unsafe extern "C" fn(*mut c_int) -> c_int;
        let (init, count) = (self.symbol(c"cuInit")?, self.symbol(c"cuDeviceGetCount")?);
        // SAFETY: these are the signatures the CUDA driver API documents for the two names.
        let (init, count) = unsafe {
            (std::mem::transmute::<*mut c_void, Init>(init), std::mem::transmute::<*mut c_void, Count>(count))
        };
        let mut devices: c_int = 0;
        // SAFETY: flags must be 0; the pointer is valid.
        let code = unsafe {
            match init(0) {
                0 => count(&mut devices),
                code => code,
            }
        };
        match code {
            0 => Ok(devices.max(0) as usize),
            code => Err(format!("the NVIDIA driver does not start (CUDA error {code})")),
        }
    }
}
