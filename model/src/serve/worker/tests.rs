//! The compute thread's loop, round by round: real sessions, no thread, and a clock that stands still.

use std::{
    path::Path,
    pin::Pin,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Waker},
};

use coel_kernels::{
    DeviceCache, DeviceExpert, DeviceMatrix, DeviceRows, DeviceVector, DeviceWork, Gated,
    angles::Angles,
    cpu::CpuKernels,
    kv::{CacheShape, Span},
};
use coel_weights::{
    checkpoint::Checkpoint,
    layout::{self, ExpertId},
    slices::{Precision, Weight},
};
use tokio::sync::oneshot;

use super::*;
use crate::{
    nn::{batch::Want, expert_call::by_expert},
    serve::{
        engine::{Engine, EngineOptions},
        expert_source::{ExpertOutputs, ExpertRequest, ExpertSource, Share, SourceError},
        jobs::{Advanced, JobQueue, RemoteCall, Routes},
        session::Session,
    },
};

/// The bundled model on a worker that is driven by hand.
struct Bench {
    engine: Engine,
    worker: Worker,
    queue: mpsc::Receiver<Job>,
    now: Instant,
    checkpoint: Checkpoint,
}

type Result2 = Result<(Advanced, Routes), EngineError>;

/// A session's request under way. It owns the session, as a task would.
type Request = Pin<Box<dyn Future<Output = (Session, Result2)>>>;

impl Bench {
    fn new() -> Self {
        Self::with(Box::new(CpuKernels::default()), None)
    }

    /// With so many bytes for experts above the memory of the host, which is the same kernel class here.
    fn with_room(device_expert_bytes: Option<u64>) -> Self {
        Self::with(Box::new(CpuKernels::default()), device_expert_bytes)
    }

    fn with(kernels: Box<dyn DynKernels>, device_expert_bytes: Option<u64>) -> Self {
        let checkpoint = Checkpoint::open(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/fixture"))).unwrap();
        let options =
            EngineOptions { kv_tokens: 1024, page_tokens: 16, device_expert_bytes, ..EngineOptions::default() };
        let (jobs, queue) = JobQueue::new(Arc::new(EngineState::new(checkpoint.config().clone(), options)));
        let mut worker = Worker::new(kernels, jobs.state.clone());
        let engine = Engine::new(jobs, Device::Cpu, "test");
        worker.executor.load_trunk(&checkpoint.trunk(), false).unwrap();
        for id in layout::experts(checkpoint.config()) {
            worker.executor.load_expert(id, &checkpoint.expert(id)).unwrap();
        }
        Self { engine, worker, queue, now: Instant::now(), checkpoint }
    }

    fn round(&mut self) -> Turn {
        self.worker.guarded(None, &mut self.queue, &|| self.now).expect("the thread goes on")
    }

    /// Rounds until there is nothing to compute; the clock moves as far as it must.
    fn rest(&mut self) {
        loop {
            match self.round() {
                Turn::Again => {}
                Turn::Wait(Some(until)) => self.now = until,
                Turn::Wait(None) => return,
            }
        }
    }

    /// Asks in the name of a session, which must then be polled.
    fn ask(&self, mut session: Session, tokens: &[u32]) -> Request {
        let tokens = tokens.to_vec();
        let mut request: Request = Box::pin(async move {
            let result = session.advance_watched(&tokens, Want::Last).await;
            (session, result)
        });
        assert!(poll(&mut request).is_none(), "the job is on its way");
        request
    }

    fn open(&self, capacity: usize) -> Session {
        self.engine.open_session(capacity).unwrap()
    }

    /// The logits after `tokens`, and where they went, from a session that is alone.
    fn alone(&mut self, tokens: &[u32]) -> (Vec<f32>, Routes) {
        let mut request = self.ask(self.open(tokens.len()), tokens);
        self.rest();
        let (advanced, routes) = poll(&mut request).expect("it has landed").1.unwrap();
        drop(request);
        self.rest();
        (advanced.logits, routes)
    }

    fn drop_expert(&mut self, layer: u16, index: u16) {
        assert!(self.worker.executor.drop_expert(ExpertId { layer, index }));
    }
}

fn poll(request: &mut Request) -> Option<(Session, Result2)> {
    match request.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(done) => Some(done),
        Poll::Pending => None,
    }
}

fn tokens(count: usize, salt: u32) -> Vec<u32> {
    (0..count as u32).map(|index| (index * index * 7 + index * 13 + salt * 101 + 5) % 4096).collect()
}

/// Experts that `routes` use in a layer.
fn used(routes: &Routes, layer: usize) -> Vec<u16> {
    by_expert(&routes[layer]).into_keys().collect()
}

#[test]
fn a_peers_call_is_served_between_two_layers_of_a_prompt() {
    let mut bench = Bench::new();
    let mut prompt = bench.ask(bench.open(500), &tokens(500, 1));
    let hidden = bench.checkpoint.config().hidden_size;
    let rows: Vec<f32> = (0..3 * hidden).map(|index| (index % 17) as f32 / 16.0 - 0.5).collect();
    let call = |bench: &mut Bench| {
        let engine = bench.engine.clone();
        let mut call = Box::pin(engine.run_experts(2, rows.clone(), vec![(3, vec![0, 2]), (5, vec![1])]));
        let context = &mut Context::from_waker(Waker::noop());
        assert!(call.as_mut().poll(context).is_pending(), "the job is on its way");
        let turn = bench.round();
        let Poll::Ready(outputs) = call.as_mut().poll(context) else { panic!("not served within the round") };
        (turn, outputs.unwrap())
    };
    let (turn, expected) = call(&mut bench);
    assert_eq!((turn, expected.len()), (Turn::Again, 3 * hidden));
    let mut rounds = 1;
    while poll(&mut prompt).is_none() {
        let (_, answer) = call(&mut bench);
        assert_eq!(answer, expected);
        rounds += 1;
    }
    assert_eq!(rounds, 2 * 7, "two batches, each beginning and then going through six layers");
}

#[test]
fn sessions_that_ask_together_are_computed_together_and_get_what_they_would_alone() {
    let mut bench = Bench::new();
    let inputs: Vec<_> = (0..8).map(|salt| tokens(1 + 9 * salt as usize, salt)).collect();
    let expected: Vec<_> = inputs.iter().map(|input| bench.alone(input)).collect();
    let before = bench.engine.activity();
    let mut requests: Vec<_> = inputs.iter().map(|input| bench.ask(bench.open(80), input)).collect();
    bench.rest();
    let activity = bench.engine.activity();
    let rows: usize = inputs.iter().map(Vec::len).sum();
    assert_eq!((activity.rows - before.rows, activity.waiting), (rows as u64, 0));
    assert!(activity.batches - before.batches < 8, "{activity:?}");
    for (request, (logits, routes)) in requests.iter_mut().zip(expected) {
        let (session, result) = poll(request).expect("it has landed");
        let (advanced, seen) = result.unwrap();
        assert_eq!((advanced.pairs_here, advanced.pairs_elsewhere), (24 * session.used() as u64, 0));
        assert_eq!(advanced.precisions, [Precision::Exact].into());
        assert!(advanced.logits == logits && seen == routes);
    }
    drop(requests);
    assert_eq!(bench.engine.kv_tokens_free(), 1024);
}

#[test]
fn who_is_late_is_waited_for_until_patience_ends() {
    let mut bench = Bench::new();
    let mut requests: Vec<_> = (0..3).map(|salt| bench.ask(bench.open(8), &tokens(1, salt))).collect();
    bench.rest();
    let mut sessions: Vec<_> = requests.iter_mut().map(|request| poll(request).unwrap().0).collect();
    drop(requests);
    let mut first = bench.ask(sessions.pop().unwrap(), &[7]);
    assert!(matches!(bench.round(), Turn::Wait(Some(until)) if until > bench.now));
    // One comes, one goes: nobody is left to wait for.
    let mut second = bench.ask(sessions.pop().unwrap(), &[8]);
    drop(sessions);
    let before = bench.engine.activity();
    bench.rest();
    assert!(poll(&mut first).is_some() && poll(&mut second).is_some());
    let after = bench.engine.activity();
    assert_eq!((after.batches - before.batches, after.rows - before.rows), (1, 2));
}

#[test]
fn only_those_fail_that_need_a_missing_expert_and_they_are_as_before() {
    let mut bench = Bench::new();
    let inputs = [tokens(3, 1), tokens(2, 2), tokens(2, 3)];
    let expected = inputs.clone().map(|input| bench.alone(&input));
    // An expert of layer 4 that only the first needs.
    let others: Vec<u16> = [1, 2].iter().flat_map(|index| used(&expected[*index].1, 4)).collect();
    let missing = used(&expected[0].1, 4).into_iter().find(|expert| !others.contains(expert)).expect("routes differ");
    bench.drop_expert(4, missing);
    let mut requests = inputs.clone().map(|input| bench.ask(bench.open(8), &input));
    bench.rest();
    let [first, rest @ ..] = &mut requests;
    let (session, result) = poll(first).expect("it has ended");
    let message = result.unwrap_err().to_string();
    assert_eq!((session.used(), message), (0, format!("layer 4 expert {missing} is not held here")));
    for (request, (logits, routes)) in rest.iter_mut().zip(&expected[1..]) {
        let (advanced, seen) = poll(request).expect("it has landed").1.unwrap();
        assert!(advanced.logits == *logits && seen == *routes);
        assert_eq!(advanced.pairs_here, 2 * 24, "counted once, though computed twice");
    }
    // Once the expert is there, the session goes on.
    let id = ExpertId { layer: 4, index: missing };
    bench.worker.executor.load_expert(id, &bench.checkpoint.expert(id)).unwrap();
    let mut again = bench.ask(session, &inputs[0]);
    bench.rest();
    assert!(poll(&mut again).unwrap().1.unwrap().0.logits == expected[0].0);
}

#[test]
fn pages_are_kept_while_they_fly_and_no_longer() {
    let mut bench = Bench::new();
    let gone = bench.ask(bench.open(160), &tokens(160, 1));
    let mut stays = bench.ask(bench.open(16), &tokens(3, 2));
    bench.round();
    bench.round();
    drop(gone);
    assert_eq!(bench.engine.activity().pages_used, 11, "the batch still writes them");
    bench.rest();
    assert_eq!(bench.engine.activity().pages_used, 1);
    let (session, result) = poll(&mut stays).unwrap();
    assert!(result.unwrap().0.logits == bench.alone(&tokens(3, 2)).0);
    drop(session);
    // A batch that nobody waits for any more is cancelled.
    let all = bench.ask(bench.open(160), &tokens(160, 1));
    bench.round();
    drop(all);
    assert_eq!(bench.engine.activity().pages_used, 10);
    assert_eq!(bench.round(), Turn::Wait(None));
    assert_eq!(bench.engine.activity().pages_used, 0);
}

#[test]
fn an_advance_that_was_given_up_leaves_the_session_as_it_was() {
    let mut bench = Bench::new();
    let mut session = bench.open(300);
    let given_up = tokens(280, 9);
    {
        let mut advance = Box::pin(session.advance(&given_up, Want::Last));
        assert!(advance.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        (0..3).for_each(|_| _ = bench.round());
    }
    let mut request = bench.ask(session, &tokens(20, 4));
    bench.rest();
    let (session, result) = poll(&mut request).unwrap();
    assert_eq!(session.used(), 20);
    assert!(result.unwrap().0.logits == bench.alone(&tokens(20, 4)).0);
}

/// Keeps what it is asked until the test answers.
#[derive(Default)]
struct Held(Mutex<Vec<ExpertRequest>>);

impl ExpertSource for Held {
    fn ask(&self, request: ExpertRequest) {
        self.0.lock().unwrap().push(request);
    }
}

impl Held {
    fn take(&self) -> Vec<ExpertRequest> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// Experts over rows, on a bench that holds all of them in memory.
fn compute(bench: &mut Bench, layer: u16, rows: Vec<f32>, experts: Vec<(u16, Vec<u32>)>) -> Vec<f32> {
    let (reply, mut answer) = oneshot::channel();
    bench.worker.work(Job::RunExperts { call: RemoteCall { layer, rows, experts }, reply });
    answer.try_recv().expect("nothing is on disk").unwrap().outputs
}

/// Two engines: one that lacks every third expert, and one that has them all.
fn apart() -> (Bench, Bench, Arc<Held>) {
    let (mut bench, other) = (Bench::new(), Bench::new());
    for id in layout::experts(bench.checkpoint.config()).filter(|id| id.index % 3 == 0) {
        bench.drop_expert(id.layer, id.index);
    }
    let source = Arc::new(Held::default());
    bench.engine.set_source(source.clone());
    (bench, other, source)
}

/// What `bench` has for a call, by a host of some class.
fn serve(bench: &mut Bench, request: ExpertRequest, class: &str) {
    let call = &request.call;
    let pairs = by_expert(&call.routes);
    let calls = pairs.iter().map(|(index, pairs)| (*index, pairs.iter().map(|pair| pair.row).collect()));
    let outputs = compute(bench, call.layer, call.rows.clone(), calls.collect());
    let mut values = vec![f32::NAN; outputs.len()];
    for (pair, row) in pairs.values().flatten().zip(outputs.chunks_exact(call.hidden)) {
        values[pair.slot as usize * call.hidden..][..call.hidden].copy_from_slice(row);
    }
    let slots = (0..call.slots() as u32).collect();
    let shares = vec![Share { elsewhere: Some(class.into()), slots }];
    request.reply.answer(Ok(ExpertOutputs { values, shares }));
}

#[test]
fn experts_from_elsewhere_change_no_bit_and_are_counted_to_whoever_needed_them() {
    let (mut bench, mut other, source) = apart();
    let inputs = [tokens(5, 1), tokens(1, 2)];
    let expected = inputs.clone().map(|input| other.alone(&input));
    let mut requests = inputs.clone().map(|input| bench.ask(bench.open(8), &input));
    loop {
        bench.rest();
        let asked = source.take();
        if asked.is_empty() {
            break;
        }
        assert_eq!(asked.len(), 1, "both are in one batch");
        for request in asked {
            assert!(request.call.routes.iter().flatten().all(|route| route.expert % 3 == 0));
            serve(&mut other, request, "avx2/q4");
        }
    }
    for (request, (logits, routes)) in requests.iter_mut().zip(expected) {
        let (advanced, seen) = poll(request).expect("it has landed").1.unwrap();
        assert!(advanced.logits == logits && seen == routes);
        let elsewhere = routes.iter().flatten().flatten().filter(|route| route.expert % 3 == 0).count() as u64;
        let all = routes.iter().flatten().flatten().count() as u64;
        assert_eq!((advanced.pairs_elsewhere, advanced.pairs_here), (elsewhere, all - elsewhere));
        assert_eq!(advanced.classes, ["avx2/q4"]);
    }
}

#[test]
fn while_one_batch_waits_another_computes() {
    let (mut bench, mut other, source) = apart();
    let inputs = [tokens(9, 1), tokens(1, 2), tokens(1, 3)];
    let expected = inputs.clone().map(|input| other.alone(&input).0);
    let mut requests = Vec::new();
    for input in &inputs {
        requests.push(bench.ask(bench.open(16), input));
        bench.rest();
    }
    assert_eq!((source.0.lock().unwrap().len(), bench.engine.activity().waiting), (2, 1), "two batches and no more");
    // The second batch is answered first all the way; the third begins in its place.
    let mut first = source.0.lock().unwrap().remove(0);
    while poll(&mut requests[1]).is_none() {
        source.take().into_iter().for_each(|request| serve(&mut other, request, "x"));
        bench.rest();
    }
    assert!(poll(&mut requests[0]).is_none());
    loop {
        serve(&mut other, first, "x");
        bench.rest();
        let mut asked = source.take();
        let Some(next) = asked.pop() else { break };
        asked.into_iter().for_each(|request| serve(&mut other, request, "x"));
        first = next;
    }
    let landed = [0, 2].map(|index| poll(&mut requests[index]).expect("it has landed").1.unwrap().0.logits);
    assert!(landed == [expected[0].clone(), expected[2].clone()]);
}

#[test]
fn what_cannot_be_had_elsewhere_fails_those_who_need_it_in_the_sources_words() {
    let (mut bench, mut other, source) = apart();
    let inputs = [tokens(4, 1), tokens(1, 2)];
    let expected = inputs.clone().map(|input| other.alone(&input));
    let theirs = used(&expected[1].1, 3);
    let lost = used(&expected[0].1, 3).into_iter().find(|expert| expert % 3 == 0 && !theirs.contains(expert));
    let lost = lost.expect("routes differ");
    let mut requests = inputs.clone().map(|input| bench.ask(bench.open(8), &input));
    let mut failures = 0;
    loop {
        bench.rest();
        let asked = source.take();
        if asked.is_empty() {
            break;
        }
        for request in asked {
            let call = &request.call;
            if call.layer == 3 && by_expert(&call.routes).contains_key(&lost) {
                failures += 1;
                request.reply.answer(Err(SourceError::Missing(format!("nobody has {lost}"))));
            } else {
                serve(&mut other, request, "x");
            }
        }
    }
    assert_eq!(failures, 2, "once together, once alone");
    let (session, result) = poll(&mut requests[0]).unwrap();
    assert!(
        matches!(result, Err(EngineError::Source(SourceError::Missing(text))) if text == format!("nobody has {lost}"))
    );
    assert_eq!(session.used(), 0);
    assert!(poll(&mut requests[1]).unwrap().1.unwrap().0.logits == expected[1].0);
    // A source that drops a request, or answers with too little, has failed.
    let mut request = bench.ask(session, &inputs[0]);
    bench.rest();
    drop(source.take());
    bench.rest();
    let (session, result) = poll(&mut request).unwrap();
    assert!(matches!(result, Err(EngineError::Source(SourceError::Failed(_)))));
    let mut request = bench.ask(session, &inputs[0]);
    bench.rest();
    source.take().into_iter().for_each(|request| request.reply.answer(Ok(ExpertOutputs::default())));
    bench.rest();
    assert!(matches!(poll(&mut request).unwrap().1, Err(EngineError::Source(SourceError::Failed(_)))));
}

#[test]
fn wherever_experts_are_one_class_gives_the_same_bits() {
    let prompts = [tokens(70, 1), tokens(1, 2), tokens(9, 3)];
    let run = |bench: &mut Bench| prompts.clone().map(|prompt| bench.alone(&prompt));
    let expected = run(&mut Bench::new());
    let expert = 3 * 96 * 256 * 2;
    for room in [0, 1, 40, 143, 144] {
        let mut bench = Bench::with_room(Some(room * expert));
        assert!(run(&mut bench) == expected, "mapped, room for {room}");
        let before = bench.engine.offload_stats().device;
        assert!(before.bytes <= room * expert, "{before:?}");
        // Weights in memory of the process's own are given up above, and come back.
        for id in layout::experts(bench.checkpoint.config()) {
            let tensors = bench.checkpoint.expert(id).moved(|_, bytes| bytes.owned()).unwrap();
            bench.worker.executor.load_expert(id, &tensors).unwrap();
        }
        for _ in 0..3 {
            assert!(run(&mut bench) == expected, "owned, room for {room}");
        }
        let device = bench.engine.offload_stats().device;
        assert!(device.bytes <= room * expert, "{device:?}");
        assert_eq!(device.on_cpu + device.promoted > 0, room < 144, "{device:?}");
        assert_eq!(device.hits > 0, room > 0, "{device:?}");
        assert_eq!(bench.engine.memory().cpu_offload_bytes, 144 * expert - device.bytes);
    }
}

#[test]
fn a_call_takes_experts_from_both_memories() {
    let hidden = 256;
    let rows: Vec<f32> = (0..5 * hidden).map(|index| (index % 17) as f32 / 16.0 - 0.5).collect();
    // One expert twice, and one without rows.
    let calls = vec![(7, vec![0, 2]), (3, vec![1]), (23, vec![]), (7, vec![4]), (0, vec![3])];
    let run = |bench: &mut Bench| compute(bench, 2, rows.clone(), calls.clone());
    let expected = run(&mut Bench::new());
    for room in [0, 52, 54, 56, 72, 144] {
        let mut bench = Bench::with_room(Some(room * 3 * 96 * 256 * 2));
        for _ in 0..4 {
            assert!(run(&mut bench) == expected, "room for {room}");
        }
    }
}

/// What a device does when it is told to compute experts.
#[derive(Default)]
struct Switches {
    panics: AtomicBool,
    lost: AtomicBool,
}

/// CPU kernels that panic on demand, once or for good.
struct Faulty {
    inner: Box<dyn DynKernels>,
    switches: Arc<Switches>,
}

impl Faulty {
    fn bench() -> (Bench, Arc<Switches>) {
        let switches = Arc::new(Switches::default());
        let inner = Box::new(CpuKernels::default());
        (Bench::with(Box::new(Self { inner, switches: switches.clone() }), None), switches)
    }

    fn check(&self) {
        assert!(!self.switches.lost.load(Ordering::Relaxed), "device lost");
        assert!(!self.switches.panics.swap(false, Ordering::Relaxed), "out of device memory");
    }
}

impl DynKernels for Faulty {
    fn class(&self) -> String {
        self.inner.class()
    }

    fn matrix(&self, weight: Weight) -> DeviceMatrix {
        self.inner.matrix(weight)
    }

    fn expert(&self, weights: Gated<Weight>) -> DeviceExpert {
        self.check();
        self.inner.expert(weights)
    }

    fn expert_weights(&self, expert: &DeviceExpert) -> Gated<Weight> {
        self.inner.expert_weights(expert)
    }

    fn expert_bytes(&self, weights: &Gated<Weight>) -> u64 {
        self.inner.expert_bytes(weights)
    }

    fn reserve(&self, bytes: u64) {
        self.inner.reserve(bytes);
    }

    fn wait(&self) {
        self.inner.wait();
    }

    fn vector(&self, values: Vec<f32>) -> DeviceVector {
        self.inner.vector(values)
    }

    fn upload(&self, values: Vec<f32>, width: usize) -> DeviceRows {
        self.inner.upload(values, width)
    }

    fn download(&self, rows: DeviceRows) -> Vec<f32> {
        self.inner.download(rows)
    }

    fn add(&self, a: DeviceRows, b: DeviceRows) -> DeviceRows {
        self.inner.add(a, b)
    }

    fn clamp(&self, rows: DeviceRows, limit: f32) -> DeviceRows {
        self.inner.clamp(rows, limit)
    }

    fn select(&self, rows: &DeviceRows, ranges: &[(usize, usize)]) -> DeviceRows {
        self.inner.select(rows, ranges)
    }

    fn linears(&mut self, x: &DeviceRows, matrices: &[(&DeviceMatrix, Option<&DeviceVector>)]) -> Vec<DeviceRows> {
        self.check();
        self.inner.linears(x, matrices)
    }

    fn rms_norm(&mut self, x: &DeviceRows, weight: &DeviceVector, eps: f32) -> DeviceRows {
        self.inner.rms_norm(x, weight, eps)
    }

    fn rotate(&mut self, x: DeviceRows, angles: &Angles) -> DeviceRows {
        self.inner.rotate(x, angles)
    }

    fn cache(&self, shape: CacheShape) -> DeviceCache {
        self.inner.cache(shape)
    }

    fn append(&mut self, cache: &mut DeviceCache, layer: usize, spans: &[Span<'_>], k: DeviceRows, v: DeviceRows) {
        self.inner.append(cache, layer, spans, k, v);
    }

    fn attention(&mut self, q: DeviceRows, cache: &DeviceCache, layer: usize, spans: &[Span<'_>]) -> DeviceRows {
        self.inner.attention(q, cache, layer, spans)
    }

    fn experts(&mut self, x: &DeviceRows, work: &[DeviceWork<'_>]) -> DeviceRows {
        self.check();
        self.inner.experts(x, work)
    }
}

#[test]
fn a_panic_fails_what_is_under_way_and_nothing_after_it() {
    let (mut bench, switches) = Faulty::bench();
    let (short, long) = (tokens(20, 4), tokens(300, 5));
    let expected = [bench.alone(&short).0, bench.alone(&long).0];
    // A batch that is as large as may be, and one that waits.
    for prompts in [vec![256], vec![30, 30, 30], vec![300, 1]] {
        let mut requests: Vec<_> =
            prompts.iter().zip(0..).map(|(count, salt)| bench.ask(bench.open(320), &tokens(*count, salt))).collect();
        (0..3).for_each(|_| _ = bench.round());
        switches.panics.store(true, Ordering::Relaxed);
        bench.rest();
        for request in &mut requests {
            let (session, result) = poll(request).expect("answered");
            let error = result.unwrap_err();
            assert!(matches!(&error, EngineError::Panicked(why) if why.contains("out of device memory")), "{error}");
            assert_eq!(session.used(), 0);
        }
        drop(requests);
        assert!([bench.alone(&short).0, bench.alone(&long).0] == expected, "later requests are answered as before");
        assert_eq!((bench.engine.activity().pages_used, bench.engine.fault()), (0, None));
    }
}

#[test]
fn a_peers_call_that_panics_fails_alone_with_those_that_wait() {
    let (mut bench, switches) = Faulty::bench();
    let rows: Vec<f32> = (0..256).map(|index| index as f32 / 256.0).collect();
    let expected = compute(&mut bench, 2, rows.clone(), vec![(3, vec![0])]);
    let engine = bench.engine.clone();
    let mut call = Box::pin(engine.run_experts(2, rows.clone(), vec![(3, vec![0])]));
    let context = &mut Context::from_waker(Waker::noop());
    assert!(call.as_mut().poll(context).is_pending());
    switches.panics.store(true, Ordering::Relaxed);
    bench.rest();
    let Poll::Ready(result) = call.as_mut().poll(context) else { panic!("not answered") };
    assert!(matches!(result, Err(EngineError::Panicked(_))), "{result:?}");
    assert_eq!(compute(&mut bench, 2, rows, vec![(3, vec![0])]), expected);
}

#[test]
fn an_expert_whose_replacement_panics_stays_as_it_was() {
    let (mut bench, switches) = Faulty::bench();
    let id = ExpertId { layer: 1, index: 2 };
    let expected = bench.alone(&tokens(20, 4)).0;
    let engine = bench.engine.clone();
    let mut load = Box::pin(engine.load_expert_tensors(id, bench.checkpoint.expert(id)));
    let context = &mut Context::from_waker(Waker::noop());
    assert!(load.as_mut().poll(context).is_pending());
    switches.panics.store(true, Ordering::Relaxed);
    bench.rest();
    let Poll::Ready(result) = load.as_mut().poll(context) else { panic!("not answered") };
    assert!(matches!(result, Err(EngineError::Panicked(_))), "{result:?}");
    assert_eq!(bench.engine.held().get(&id), Some(&Precision::Exact));
    assert!(bench.alone(&tokens(20, 4)).0 == expected);
}

#[test]
fn a_panic_while_experts_change_places_ends_the_thread_by_name() {
    let switches = Arc::new(Switches::default());
    let inner = Box::new(CpuKernels::default());
    let kernels = Box::new(Faulty { inner, switches: switches.clone() });
    // Some experts are on the device: the next one to be loaded is promoted.
    let mut bench = Bench::with(kernels, Some(40 * 3 * 96 * 256 * 2));
    let id = ExpertId { layer: 0, index: 0 };
    let engine = bench.engine.clone();
    let mut load = Box::pin(engine.load_expert_tensors(id, bench.checkpoint.expert(id)));
    let context = &mut Context::from_waker(Waker::noop());
    assert!(load.as_mut().poll(context).is_pending());
    switches.panics.store(true, Ordering::Relaxed);
    while bench.worker.guarded(None, &mut bench.queue, &|| bench.now).is_some_and(|turn| turn == Turn::Again) {}
    let fault = bench.engine.fault().expect("the accounts may be torn");
    assert!(fault.contains("loaded or moved") && fault.contains("out of device memory"), "{fault}");
}

#[test]
fn a_lost_device_ends_the_thread_by_name() {
    let (mut bench, switches) = Faulty::bench();
    let mut request = bench.ask(bench.open(40), &tokens(30, 1));
    bench.round();
    switches.lost.store(true, Ordering::Relaxed);
    while bench.worker.guarded(None, &mut bench.queue, &|| bench.now).is_some() {}
    let error = poll(&mut request).expect("answered").1.unwrap_err();
    assert!(matches!(&error, EngineError::Panicked(why) if why.contains("device lost")), "{error}");
    let fault = bench.engine.fault().expect("the engine knows why");
    assert!(fault.contains("device lost"), "{fault}");
    let Bench { engine, queue, .. } = bench;
    drop(queue); // as the thread does when it ends
    let refused = crate::serve::engine::block_on(engine.drop_expert(ExpertId { layer: 0, index: 0 })).unwrap_err();
    assert!(matches!(&refused, EngineError::Failed(why) if why.contains("device lost")), "{refused}");
}
