//! `coel eval` reports the cost of fewer bits, and which policy for spending bits costs least.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::Value;

use crate::support::{coel, fixture, turn};

/// Writes the beginnings of the held-out texts to `folder`.
fn texts(folder: &tempfile::TempDir, characters: usize) -> Vec<PathBuf> {
    let kinds = ["chat", "code", "encyclopedia", "plays", "speeches"].into_iter();
    let cut = kinds.map(|kind| {
        let text = std::fs::read_to_string(fixture().join(format!("golden/{kind}.txt"))).unwrap();
        let file = folder.path().join(kind);
        std::fs::write(&file, text.chars().take(characters).collect::<String>()).unwrap();
        file
    });
    cut.collect()
}

#[tokio::test]
async fn policies_are_compared_at_equal_bytes() {
    let _turn = turn().await;
    let folder = tempfile::tempdir().unwrap();
    let questions = folder.path().join("questions");
    let question = r#"{"question": "Tell me the capital of Greece.", "answer": "The capital of Greece is Athens."}"#;
    std::fs::write(&questions, question).unwrap();
    let mut command: Vec<PathBuf> = ["eval", "--model"].map(PathBuf::from).into();
    command.extend([fixture(), "--text".into()]);
    command.extend(texts(&folder, 2500));
    command.extend(["--qa".into(), questions]);
    command.extend(["--policies", "--seeds", "2", "--json"].map(PathBuf::from));
    let printed = coel(command).await;
    let report: Value = serde_json::from_str(printed.printed()).unwrap();
    assert_eq!((&report["trunk"], &report["bits"]), (&Value::from("exact"), &Value::from(6.0)));
    let rows: BTreeMap<&str, &Value> =
        report["policies"].as_array().unwrap().iter().map(|row| (row["policy"].as_str().unwrap(), row)).collect();
    let kl = |policy: &str| rows[policy]["kl_divergence"].as_f64().unwrap();
    let mixed = ["uniform", "random", "popularity", "expected loss"];
    for policy in mixed {
        assert_eq!(rows[policy]["expert_bytes"], rows["uniform"]["expert_bytes"], "{policy}");
        assert_eq!(rows[policy]["raised"], 54, "{policy}");
        assert!(kl("q8") < kl(policy) && kl(policy) < kl("q4"), "{report:#}");
    }
    assert_eq!((kl("exact"), &rows["exact"]["accuracy"]), (0.0, &Value::from(1.0)));
    assert_eq!(&rows["random"]["runs"], 2);
    assert!(kl("expected loss") < kl("popularity") && kl("popularity") < kl("uniform"), "{report:#}");
}

#[tokio::test]
async fn fewer_bits_are_measured_and_not_failed() {
    let _turn = turn().await;
    let folder = tempfile::tempdir().unwrap();
    let questions = folder.path().join("questions");
    let wrong = r#"{"question": "Tell me the capital of Greece.", "answer": "Athens", "reference": "Sparta"}"#;
    std::fs::write(&questions, wrong).unwrap();
    let ask = |precision: &str| {
        let command = ["eval", "--precision", precision, "--json", "--model"].map(PathBuf::from).into_iter();
        coel(command.chain([fixture(), "--qa".into(), questions.clone()]).collect::<Vec<_>>())
    };
    ask("exact").await.refused(1, &["too few answers"]);
    let report: Value = serde_json::from_str(ask("q4").await.printed()).unwrap();
    assert_eq!(report["reference_equal"], 0.0);
    let both = ["eval", "--model", "x", "--text", "x", "--qa", "x"];
    coel(both).await.refused(2, &["--policies"]);
    let outside = ["eval", "--model", "x", "--text", "x", "--policies", "--bits", "9.5"];
    coel(outside).await.refused(2, &["from 4.5 to 8.5"]);
}
