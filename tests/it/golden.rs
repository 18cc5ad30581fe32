//! The model alone on this machine, as the measure of what a mesh does; and the golden continuations, from a mesh.
//!
//! [`Alone`] runs the bundled checkpoint in this process, with no node anywhere: what it routes, chooses and weighs is what
//! nodes must have routed, chosen and fetched. The golden file was made by another program altogether.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use coel_model::nn::batch::Want;
use coel_model::serve::device::Device;
use coel_model::serve::engine::block_on;
use coel_model::text::chat::Message;
use coel_model::text::sampling::SamplingParams;
use coel_model::text::sequence::GenerateParams;
use coel_model::tools::generate::{Generation, LocalModel, LocalOptions};
use coel_model::tools::popularity::{CALIBRATION_TEXT, WINDOW_TOKENS};
use coel_model::weights::checkpoint::Checkpoint;
use coel_model::weights::parts::parts;
use coel_model::weights::slices::Precision;
use coel_node::ids;
use coel_node::status::expert_key;
use coel_store::ExpertId;
use serde_json::Value;

use crate::support::{QUESTION, coel, continue_tokens, fixture, turn};

const REFERENCE: &str = "golden/reference.safetensors";

/// The bundled model in this process.
pub struct Alone {
    checkpoint: Checkpoint,
    model: LocalModel,
}

impl Alone {
    pub fn new() -> Self {
        let checkpoint = Checkpoint::open(&fixture()).unwrap();
        Self { checkpoint, model: apart(|| LocalModel::open(&fixture(), Device::Cpu).unwrap()) }
    }

    /// The same with experts held at another precision, all of them in memory.
    pub fn at(experts: Precision) -> Self {
        let options = LocalOptions { device: Device::Cpu, experts, ..LocalOptions::default() };
        Self { model: apart(|| LocalModel::open_with(&fixture(), &options).unwrap()), ..Self::new() }
    }

    /// A question of one turn, as tokens.
    pub fn prompt(&self, question: &str) -> Vec<u32> {
        self.model.text.chat_prompt(&[Message::user(question)]).unwrap()
    }

    /// The greedy answer to it.
    pub fn answer(&self, question: &str) -> Generation {
        let params = GenerateParams { sampling: SamplingParams::greedy(), ..GenerateParams::default() };
        apart(|| self.model.chat(question, params, |_| ()).unwrap())
    }

    /// A prompt whose greedy continuation is long: the golden one that meets its end of text last.
    pub fn story(&self) -> Vec<u32> {
        let golden = Golden::read(&fixture().join(REFERENCE));
        let is_eos = |token: &u32| self.model.text.tokenizer.is_eos(*token);
        let length = |row: &[u32]| row[golden.input..].iter().position(is_eos);
        let longest = golden.rows.iter().max_by_key(|row| length(row).unwrap_or(usize::MAX)).unwrap();
        longest[..golden.input].to_vec()
    }

    /// The expert of every (row, expert) pair that these tokens cost over all layers, by its key.
    pub fn routes(&self, tokens: &[u32]) -> Vec<String> {
        apart(|| self.routes_here(tokens))
    }

    fn routes_here(&self, tokens: &[u32]) -> Vec<String> {
        let mut session = self.model.engine.open_session(tokens.len()).unwrap();
        let (_, routes) = block_on(session.advance_watched(tokens, Want::Last)).unwrap();
        let layers = routes.iter().zip(0..);
        let routed = layers.flat_map(|(rows, layer)| rows.iter().flatten().map(move |route| (layer, route.expert)));
        routed.map(|(layer, index)| expert_key(ExpertId { layer, index })).collect()
    }

    /// Bytes of what a node fetches that holds these experts, the manifest aside: the files beside the weights, the trunk,
    /// the experts.
    pub fn blob_bytes(&self, held: &BTreeSet<String>) -> u64 {
        let files = self.checkpoint.files().into_iter().map(|(_, path)| std::fs::metadata(path).unwrap().len());
        let wanted = parts(&self.checkpoint).into_iter().filter(|part| match part.expert() {
            Some(expert) => held.contains(&expert_key(ids::to_store(expert))),
            None => true,
        });
        files.sum::<u64>() + wanted.map(|part| part.header().len() as u64 + part.data_bytes()).sum::<u64>()
    }

    /// The hot experts, by what an import counts: the smallest set with half of the rows routed on the built-in text.
    pub fn hot(&self) -> BTreeSet<String> {
        let mut counts = BTreeMap::<String, usize>::new();
        let tokens = self.model.text.tokenizer.encode(CALIBRATION_TEXT, true).unwrap();
        for window in tokens.chunks(WINDOW_TOKENS) {
            for expert in self.routes(window) {
                *counts.entry(expert).or_default() += 1;
            }
        }
        let total: usize = counts.values().sum();
        let mut ranked: Vec<_> = counts.into_iter().collect();
        ranked.sort_by_key(|(_, rows)| std::cmp::Reverse(*rows));
        let mut mass = 0;
        let hot = ranked.into_iter().take_while(|(_, rows)| {
            let short = 2 * mass < total;
            mass += rows;
            short
        });
        hot.map(|(expert, _)| expert).collect()
    }

    /// A token as OpenAI's log-probabilities spell it: text, or else its bytes.
    fn spelled(&self, token: u32) -> String {
        let bytes = self.model.text.tokenizer.token_bytes(token);
        let escaped = || bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect::<String>();
        String::from_utf8(bytes.to_vec()).unwrap_or_else(|_| format!("bytes:{}", escaped()))
    }
}

/// Runs what blocks on the engine on a thread that no runtime knows: within an async task, a runtime that counts on tasks to
/// yield would never let it go on.
fn apart<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(work).join().unwrap())
}

/// `greedy` of the golden reference: rows of `input` prompt tokens and their continuation.
struct Golden {
    rows: Vec<Vec<u32>>,
    input: usize,
}

impl Golden {
    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let (length, rest) = bytes.split_first_chunk().unwrap();
        let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
        let header: Value = serde_json::from_slice(header).unwrap();
        let shape = |name: &str, axis: usize| header[name]["shape"][axis].as_u64().unwrap() as usize;
        let offset = |end: usize| header["greedy"]["data_offsets"][end].as_u64().unwrap() as usize;
        let ids = data[offset(0)..offset(1)].as_chunks::<8>().0.iter().map(|id| i64::from_le_bytes(*id) as u32);
        let ids: Vec<_> = ids.collect();
        Self { rows: ids.chunks(shape("greedy", 1)).map(<[u32]>::to_vec).collect(), input: shape("input_ids", 1) }
    }
}

/// Every golden continuation, token for token, from the node at `api`. The reference goes on after an end-of-text token and
/// HTTP does not, so there the rest is asked for anew.
pub async fn continuations_are_equal(api: &str, alone: &Alone) {
    let golden = Golden::read(&fixture().join(REFERENCE));
    assert_eq!((golden.rows.len(), golden.input), (5, 32));
    for (number, row) in golden.rows.iter().enumerate() {
        let mut at = golden.input;
        while at < row.len() {
            let answer = continue_tokens(api, &row[..at], row.len() - at, |_| ()).await.unwrap();
            for token in &answer.tokens {
                assert_eq!(*token, alone.spelled(row[at]), "prompt {number}, token {at}");
                at += 1;
            }
            match answer.finish_reason.as_deref() {
                Some("stop") => {
                    assert!(alone.model.text.tokenizer.is_eos(row[at]), "prompt {number} ended early, at token {at}");
                    at += 1;
                }
                Some("length") => assert_eq!(at, row.len(), "prompt {number}"),
                other => panic!("prompt {number} ended with {other:?}"),
            }
        }
    }
}

#[tokio::test]
async fn eval_prints_what_agrees_and_fails_where_anything_differs() {
    let _turn = turn().await;
    let model = fixture();
    let golden = fixture().join(REFERENCE);
    let eval = |reference: &Path| {
        let reference = reference.to_str().unwrap().to_owned();
        let model = model.to_str().unwrap().to_owned();
        async move { coel(["eval", "--model", &model, "--reference", &reference, "--json"]).await }
    };
    let agreed = eval(&golden).await;
    let report: Value = serde_json::from_str(agreed.printed()).unwrap();
    assert!(report["max_rel_logit_error"].as_f64().unwrap() <= 1e-3, "{report}");
    assert_eq!((&report["greedy_equal"], &report["greedy_total"]), (&Value::from(320), &Value::from(320)));
    assert_eq!((&report["routes_equal"], &report["routes_total"]), (&Value::from(960), &Value::from(960)));

    // The last token of the last continuation, changed.
    let folder = tempfile::tempdir().unwrap();
    let changed = folder.path().join("reference.safetensors");
    let mut bytes = std::fs::read(&golden).unwrap();
    let header_bytes = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..header_bytes]).unwrap();
    let end = header["greedy"]["data_offsets"][1].as_u64().unwrap() as usize;
    bytes[header_bytes + end - 8] ^= 1;
    std::fs::write(&changed, bytes).unwrap();
    let differs = eval(&changed).await;
    assert_eq!(differs.code, Some(1), "{differs:#?}");
    let report: Value = serde_json::from_str(&differs.stdout).unwrap();
    assert_eq!((&report["greedy_equal"], &report["greedy_total"]), (&Value::from(319), &Value::from(320)));
}

#[tokio::test]
async fn generate_answers_without_any_node() {
    let _turn = turn().await;
    let answer = coel(["generate", "--model", fixture().to_str().unwrap(), "--chat", QUESTION]).await;
    assert_eq!(answer.printed(), "The capital of France is Paris.");
}
