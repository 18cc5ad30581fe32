//! Vulkan devices: which there are, and one of them opened.
//!
//! Owns the probe and [`open`]. Devices are numbered as the driver lists them. Where there is no loader or no driver the
//! list is empty, which is an error that says what to install. A device is opened once in a process and then shared, since a
//! driver's memory and its compiled kernels belong to it.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use cubecl::{
    future::block_on,
    wgpu::{RuntimeOptions, WgpuDevice, WgpuSetup, init_device},
};
use wgpu::{Adapter, AdapterInfo, Backend, Backends, DeviceType, Features, Instance, InstanceDescriptor, MemoryHints};

/// An open device.
#[derive(Clone, Debug)]
pub struct Opened {
    pub device: WgpuDevice,
    /// As the driver calls it.
    pub name: String,
}

fn adapters() -> (Instance, Vec<Adapter>) {
    let descriptor =
        InstanceDescriptor { backends: Backends::VULKAN, ..InstanceDescriptor::new_without_display_handle() };
    let instance = Instance::new(descriptor);
    let adapters = block_on(instance.enumerate_adapters(Backends::VULKAN));
    (instance, adapters)
}

/// Adapter `number` of `found`, or what is wrong, in words.
fn pick(found: usize, number: usize) -> Result<(), String> {
    match found {
        0 => Err("no Vulkan driver is installed (Debian and Ubuntu: apt-get install mesa-vulkan-drivers)".into()),
        found if number >= found => Err(format!("the Vulkan drivers list {found} device(s)")),
        _ => Ok(()),
    }
}

/// Whether there is a device of this number.
pub fn probe(number: usize) -> Result<(), String> {
    pick(adapters().1.len(), number)
}

/// Of devices of these kinds the one to use unasked: a discrete GPU before an integrated one, never anything else.
fn best(kinds: impl Iterator<Item = DeviceType>) -> Option<usize> {
    let rank = |kind| match kind {
        DeviceType::DiscreteGpu => Some(0),
        DeviceType::IntegratedGpu => Some(1),
        DeviceType::VirtualGpu | DeviceType::Cpu | DeviceType::Other => None,
    };
    let gpus = kinds.enumerate().filter_map(|(number, kind)| Some((rank(kind)?, number)));
    gpus.min().map(|(_, number)| number)
}

/// Whether this machine may have a GPU at all. Asking the drivers of one that has none would load a software renderer,
/// compiler included, into a process that is not going to use it.
fn may_have_gpu() -> bool {
    let nodes = |dir: &str, prefix: &str| {
        let names = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.file_name());
        names.into_iter().any(|name| name.to_string_lossy().starts_with(prefix))
    };
    // Mesa's drivers, NVIDIA's, and Windows' under WSL.
    !cfg!(target_os = "linux") || nodes("/dev/dri", "renderD") || nodes("/dev", "nvidia") || nodes("/dev", "dxg")
}

/// The number of a real GPU.
pub fn gpu() -> Option<usize> {
    if !may_have_gpu() {
        return None;
    }
    best(adapters().1.iter().map(|adapter| adapter.get_info().device_type))
}

/// Opens device `number`, or gives the one that is open.
pub fn open(number: usize) -> Result<Opened, String> {
    static OPEN: Mutex<BTreeMap<usize, Opened>> = Mutex::new(BTreeMap::new());
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(opened) = open.get(&number) {
        return Ok(opened.clone());
    }
    let (instance, mut adapters) = adapters();
    pick(adapters.len(), number)?;
    let adapter = adapters.swap_remove(number);
    let AdapterInfo { name, .. } = adapter.get_info();
    let descriptor = wgpu::DeviceDescriptor {
        label: Some("coel"),
        required_features: adapter.features() - Features::MAPPABLE_PRIMARY_BUFFERS - Features::all_experimental_mask(),
        required_limits: adapter.limits(),
        memory_hints: MemoryHints::MemoryUsage,
        ..Default::default()
    };
    let (device, queue) = block_on(adapter.request_device(&descriptor)).map_err(|error| format!("{name}: {error}"))?;
    let setup = WgpuSetup { instance, adapter, device, queue, backend: Backend::Vulkan };
    let opened = Opened { device: init_device(setup, RuntimeOptions::default()), name };
    open.insert(number, opened.clone());
    Ok(opened)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_real_gpu_is_used_unasked() {
        use DeviceType::{Cpu, DiscreteGpu, IntegratedGpu, Other, VirtualGpu};
        assert_eq!(best([Cpu, Other, VirtualGpu].into_iter()), None);
        assert_eq!(best([Cpu, IntegratedGpu, DiscreteGpu, DiscreteGpu].into_iter()), Some(2));
        assert_eq!(best([Cpu, IntegratedGpu].into_iter()), Some(1));
    }

    #[test]
    fn what_is_missing_is_said() {
        assert!(pick(0, 0).unwrap_err().contains("apt-get install mesa-vulkan-drivers"));
        assert_eq!(pick(1, 1).unwrap_err(), "the Vulkan drivers list 1 device(s)");
        assert_eq!(pick(2, 1), Ok(()));
    }
}
