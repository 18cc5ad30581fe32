//! Which device computes, and whether it is really there.
//!
//! Owns [`Device`] and the probes that must pass before any GPU code runs: the CUDA backend panics where a driver or
//! the run-time compiler is missing, and a machine without a GPU must start quietly on its CPU. A probe only opens
//! libraries and lists devices; it allocates nothing on them.

use std::{fmt, str::FromStr};

pub mod vulkan;

/// The device asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Device {
    /// CUDA if it is complete, else Vulkan where that is a real GPU, else the CPU.
    #[default]
    Auto,
    Cpu,
    /// The CUDA device of this number.
    Cuda(usize),
    /// The Vulkan device of this number, as the drivers list them. A software one only if it is asked for.
    Vulkan(usize),
}

/// Why a device cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    #[error("{0:?} is no device; give auto, cpu, cuda:N or vulkan:N")]
    Unknown(String),
    #[error("{device} cannot be used: {missing}; --device cpu works without it")]
    Missing { device: Device, missing: String },
}

impl FromStr for Device {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        let unknown = || DeviceError::Unknown(text.to_owned());
        match text.split_once(':') {
            None if text == "auto" => Ok(Device::Auto),
            None if text == "cpu" => Ok(Device::Cpu),
            Some(("cuda", number)) => Ok(Device::Cuda(number.parse().map_err(|_| unknown())?)),
            Some(("vulkan", number)) => Ok(Device::Vulkan(number.parse().map_err(|_| unknown())?)),
            _ => Err(unknown()),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Auto => f.write_str("auto"),
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(number) => write!(f, "cuda:{number}"),
            Device::Vulkan(number) => write!(f, "vulkan:{number}"),
        }
    }
}

impl Device {
    /// The device to use: `Auto` becomes one that is there, an explicit one must be.
    pub fn resolve(self) -> Result<Self, DeviceError> {
        let missing = |missing| DeviceError::Missing { device: self, missing };
        match self {
            Device::Cpu => Ok(Device::Cpu),
            Device::Cuda(device) => cuda::probe(device).map(|()| self).map_err(missing),
            Device::Vulkan(device) => vulkan::probe(device).map(|()| self).map_err(missing),
            Device::Auto => match cuda::probe(0) {
                Ok(()) => Ok(Device::Cuda(0)),
                Err(missing) => Ok(vulkan::gpu().map_or_else(
                    || {
                        tracing::debug!(missing, "no CUDA, and Vulkan lists no GPU; computing on the CPU");
                        Device::Cpu
                    },
                    Device::Vulkan,
                )),
            },
        }
    }
}

#[cfg(target_os = "linux")]
mod cuda {
    use std::{
        ffi::{CStr, c_int, c_uint, c_void},
        path::{Path, PathBuf},
    };

    const DRIVERS: [&CStr; 2] = [c"libcuda.so", c"libcuda.so.1"];
    const COMPILERS: [&CStr; 3] = [c"libnvrtc.so", c"libnvrtc.so.12", c"libnvrtc.so.11"];
    /// A header the generated kernels include.
    const HEADER: &str = "include/cuda_fp16.h";

    /// Driver, device, run-time compiler and headers: what is missing, in words.
    pub(super) fn probe(device: usize) -> Result<(), String> {
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
}

#[cfg(not(target_os = "linux"))]
mod cuda {
    pub(super) fn probe(_device: usize) -> Result<(), String> {
        Err("CUDA is used on Linux only".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_written() {
        for text in ["auto", "cpu", "cuda:0", "cuda:3", "vulkan:1"] {
            assert_eq!(text.parse::<Device>().unwrap().to_string(), text);
        }
        for text in ["", "cuda", "cuda:", "cuda:x", "vulkan", "vulkan:-1", "gpu", "cpu:0"] {
            assert_eq!(text.parse::<Device>(), Err(DeviceError::Unknown(text.into())));
        }
    }

    #[test]
    fn auto_always_finds_something() {
        assert!(matches!(Device::Auto.resolve(), Ok(Device::Cpu | Device::Cuda(0) | Device::Vulkan(_))));
        assert_eq!(Device::Cpu.resolve(), Ok(Device::Cpu));
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error_that_says_what_is_missing() {
        for device in [Device::Cuda(4096), Device::Vulkan(4096)] {
            let error = device.resolve().unwrap_err().to_string();
            assert!(error.starts_with(&format!("{device} cannot be used: ")), "{error}");
        }
    }
}
