//! The bundled checkpoint against results that transformers computed from it, through the same evaluations that users
//! run.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use coel_model::{
    serve::device::Device,
    tools::{
        eval::{WINDOW_TOKENS, eval_qa, eval_reference, eval_text},
        generate::LocalModel,
    },
};

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixture")
}

fn model() -> LocalModel {
    LocalModel::open(&fixture(), Device::Cpu).expect("the bundled model opens")
}

#[test]
fn logits_continuations_and_routes() {
    let report = eval_reference(&model(), &fixture().join("golden/reference.safetensors")).unwrap();
    assert!(report.max_rel_logit_error <= 1e-3, "{report:?}");
    assert_eq!((report.greedy_equal, report.greedy_total), (320, 320), "{report:?}");
    assert_eq!((report.routes_equal, report.routes_total), (960, 960), "{report:?}");
    assert!(report.passed);
}

#[test]
fn perplexities() {
    let model = model();
    let expected = fs::read_to_string(fixture().join("golden/perplexity.json")).unwrap();
    let expected: BTreeMap<String, f64> = serde_json::from_str(&expected).unwrap();
    assert_eq!(expected.len(), 5);
    for (file, expected) in expected {
        let report = eval_text(&model, &fixture().join("golden").join(&file), WINDOW_TOKENS).unwrap();
        let error = (report.perplexity / expected - 1.0).abs();
        assert!(error <= 2e-3, "{file}: {report:?}, expected {expected}");
    }
}

#[test]
fn questions() {
    let report = eval_qa(&model(), &fixture().join("golden/qa.jsonl")).unwrap();
    assert_eq!(report.questions, 309);
    assert!(report.reference_equal.unwrap() >= 0.995 && report.passed, "{report:?}");
}
