//! Which device computes, and whether it is really there.
//!
//! Owns [`Device`], the choice between the CPU and the GPUs of this machine, and [`open`], which starts its kernels. A
//! machine without a GPU starts quietly on its CPU: GPU code runs only after the probes of `coel-gpu` have passed.

use std::{fmt, str::FromStr};

use coel_gpu::{
    cuda,
    kernels::{on_cuda, on_vulkan},
    vulkan,
};
use coel_kernels::{
    DynKernels,
    cpu::{CpuKernels, isa::Isa},
};

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

/// The kernels of a [resolved](Device::resolve) device, on `threads` threads where that is the CPU (0: one for each core
/// this process may use).
///
/// # Errors
/// In words, where the device does not open.
pub(crate) fn open(device: Device, threads: usize) -> Result<Box<dyn DynKernels>, String> {
    Ok(match device {
        Device::Cuda(index) => on_cuda(index),
        Device::Vulkan(number) => on_vulkan(vulkan::open(number)?),
        Device::Cpu | Device::Auto => Box::new(CpuKernels::new(Isa::best(), threads)),
    })
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
