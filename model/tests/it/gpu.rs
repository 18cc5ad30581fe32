//! The bundled model on a Vulkan device, in hardware or software, against the reference and the CPU. The tests of the
//! kernels themselves are in `model/gpu`.

use std::fs;

use coel_model::{
    nn::batch::Want,
    serve::{device::Device, engine::block_on},
    tools::{
        eval::eval_reference,
        generate::{LocalModel, LocalOptions},
    },
    weights::slices::Precision,
};
use safetensors::{SafeTensors, tensor::TensorView};

pub use crate::vulkan_device::vulkan;
use crate::whole;

/// The golden reference, cut to `follow` tokens of each continuation, since software devices are slow.
pub fn reference_file(follow: usize) -> tempfile::NamedTempFile {
    let bytes = fs::read(whole::fixture().join("golden/reference.safetensors")).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let (input, greedy) = (all.tensor("input_ids").unwrap().shape()[1], all.tensor("greedy").unwrap());
    let [rows, width] = greedy.shape().try_into().unwrap();
    let size = greedy.data().len() / (rows * width);
    let kept: Vec<u8> =
        greedy.data().chunks(width * size).flat_map(|row| &row[..(input + follow) * size]).copied().collect();
    let cut = TensorView::new(greedy.dtype(), vec![rows, input + follow], &kept).unwrap();
    let others = all.iter().filter(|(name, _)| *name != "greedy");
    let file = tempfile::NamedTempFile::new().unwrap();
    let tensors: Vec<_> = others.chain([("greedy", cut)]).collect();
    fs::write(file.path(), safetensors::serialize(tensors, None).unwrap()).unwrap();
    file
}

#[test]
fn the_bundled_model_answers_as_the_reference() {
    if vulkan().is_none() {
        return;
    }
    let model = LocalModel::open(&whole::fixture(), Device::Vulkan(0)).unwrap();
    assert!(model.engine.class().starts_with("vulkan-"));
    let report = eval_reference(&model, reference_file(6).path()).unwrap();
    assert!(report.max_rel_logit_error <= 1e-4, "{report:?}");
    assert_eq!((report.greedy_equal, report.greedy_total), (30, 30), "{report:?}");
    assert_eq!((report.routes_equal, report.routes_total), (960, 960), "{report:?}");
}

#[test]
fn slices_mean_what_they_mean_to_the_cpu() {
    if vulkan().is_none() {
        return;
    }
    let logits = |device, trunk, experts| {
        let options = LocalOptions { device, trunk, experts, ..LocalOptions::default() };
        let model = LocalModel::open_with(&whole::fixture(), &options).unwrap();
        let mut session = model.engine.open_session(8).unwrap();
        block_on(session.advance(&[5, 17, 300, 4000, 9], Want::All)).unwrap().logits
    };
    let squares = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
    let exact = logits(Device::Cpu, Precision::Exact, Precision::Exact);
    for (trunk, experts) in [(Precision::Q8, Precision::Q4), (Precision::Q8, Precision::Q8)] {
        let [cpu, gpu] = [Device::Cpu, Device::Vulkan(0)].map(|device| logits(device, trunk, experts));
        let (between, lost) = (squares(&cpu, &gpu), squares(&cpu, &exact));
        assert!(between < 0.01 * lost, "{trunk} {experts}: {between:e} apart, {lost:e} lost");
    }
}
