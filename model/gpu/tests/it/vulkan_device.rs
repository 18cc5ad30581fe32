//! The Vulkan device that tests run on, software or not.
//!
//! Where no Vulkan driver is installed the tests say so and pass; with `COEL_REQUIRE_VULKAN=1`, as in CI, they fail.

use std::{
    env,
    io::{Write, stderr},
    sync::Once,
};

use coel_gpu::{kernels::VulkanKernels, vulkan};

/// The first Vulkan device, if there is one.
pub fn vulkan() -> Option<VulkanKernels> {
    static SAID: Once = Once::new();
    match vulkan::open(0) {
        Ok(opened) => Some(VulkanKernels::on(opened)),
        Err(why) => {
            assert!(env::var_os("COEL_REQUIRE_VULKAN").is_none(), "a Vulkan device is required here: {why}");
            // Past the test harness, which keeps what passing tests print to itself.
            let said = "skipped: no Vulkan driver; apt-get install mesa-vulkan-drivers";
            SAID.call_once(|| writeln!(stderr(), "{said}").expect("stderr"));
            None
        }
    }
}
