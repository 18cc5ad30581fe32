//! Decisions in virtual time.

use std::time::{Duration, Instant};

use proptest::{collection::vec, prelude::*};

use super::*;

const LIMITS: Limits = Limits { rows: 256, prompt_rows_beside: 64, decode_rows_kept: 0 };
const MS: Duration = Duration::from_millis(1);

/// A scheduler with a clock and numbered sessions; the id of a session's `n`-th request is `100 n + session`.
struct Sim {
    scheduler: Scheduler,
    now: Instant,
    requests: BTreeMap<u64, u64>,
}

fn sim() -> Sim {
    sim_with(LIMITS)
}

fn sim_with(limits: Limits) -> Sim {
    Sim { scheduler: Scheduler::new(limits), now: Instant::now(), requests: BTreeMap::new() }
}

impl Sim {
    fn ask(&mut self, session: u64, rows: usize) -> RequestId {
        let requests = self.requests.entry(session).or_default();
        *requests += 1;
        let id = RequestId(100 * *requests + session);
        self.scheduler.submit(id, SessionId(session), rows);
        id
    }

    /// The next batch as (session, rows); panics if there is none now.
    #[track_caller]
    fn launch(&mut self) -> (Vec<ScheduledChunk>, Vec<(u64, usize)>) {
        match self.scheduler.next(self.now) {
            Decision::Run(chunks) => {
                let shown = chunks.iter().map(|chunk| (chunk.request.0 % 100, chunk.rows)).collect();
                (chunks, shown)
            }
            other => panic!("{other:?}"),
        }
    }

    fn complete(&mut self, chunks: &[ScheduledChunk], took: Duration) -> Vec<u64> {
        self.now += took;
        self.scheduler.completed(chunks, self.now, took).into_iter().map(|id| id.0 % 100).collect()
    }
}

#[test]
fn a_lone_request_waits_for_nobody() {
    let mut sim = sim();
    assert_eq!(sim.scheduler.next(sim.now), Decision::Idle);
    sim.ask(1, 40);
    let (chunks, shown) = sim.launch();
    assert_eq!(shown, [(1, 40)]);
    assert_eq!(sim.scheduler.next(sim.now), Decision::Idle);
    assert_eq!(sim.complete(&chunks, 20 * MS), [1]);
    for _ in 0..5 {
        sim.ask(1, 1);
        let (chunks, shown) = sim.launch();
        assert_eq!(shown, [(1, 1)]);
        sim.complete(&chunks, 20 * MS);
    }
}

#[test]
fn who_was_answered_is_waited_for_briefly_and_only_once() {
    let mut sim = sim();
    (1..=8).for_each(|session| _ = sim.ask(session, 1));
    let (chunks, shown) = sim.launch();
    assert_eq!(shown.len(), 8);
    sim.complete(&chunks, 12 * MS);
    // They come back one after the other; the batch waits for the last.
    let answered = sim.now;
    for session in (1..=8).rev() {
        sim.ask(session, 1);
        let decision = sim.scheduler.next(sim.now);
        match session {
            1 => assert!(matches!(&decision, Decision::Run(chunks) if chunks.len() == 8), "{decision:?}"),
            _ => assert_eq!(decision, Decision::WaitUntil(answered + 6 * MS)),
        }
        sim.now += MS / 2;
    }
    let chunks: Vec<_> = (1..=8).map(|session| ScheduledChunk { request: RequestId(200 + session), rows: 1 }).collect();
    sim.complete(&chunks, 12 * MS);
    // One stays away: the others wait half a batch, once.
    (1..=7).for_each(|session| _ = sim.ask(session, 1));
    assert_eq!(sim.scheduler.next(sim.now), Decision::WaitUntil(sim.now + 6 * MS));
    sim.now += 6 * MS;
    let (chunks, shown) = sim.launch();
    assert_eq!(shown.len(), 7);
    sim.complete(&chunks, 12 * MS);
    (1..=7).for_each(|session| _ = sim.ask(session, 1));
    assert_eq!(sim.launch().1.len(), 7);
}

#[test]
fn who_has_gone_is_not_waited_for_and_patience_has_bounds() {
    let mut sim = sim();
    for (took, patience) in [(MS / 10, MS), (8 * MS, 4 * MS), (2000 * MS, 10 * MS)] {
        (1..=2).for_each(|session| _ = sim.ask(session, 1));
        let (chunks, _) = sim.launch();
        sim.complete(&chunks, took);
        sim.ask(1, 1);
        assert_eq!(sim.scheduler.next(sim.now), Decision::WaitUntil(sim.now + patience));
        sim.scheduler.gone(SessionId(2));
        let (chunks, shown) = sim.launch();
        assert_eq!(shown, [(1, 1)]);
        sim.complete(&chunks, took);
    }
}

#[test]
fn a_long_prompt_goes_in_pieces_beside_tokens() {
    let mut sim = sim();
    sim.ask(9, 200);
    (1..=3).for_each(|session| _ = sim.ask(session, 1));
    for left in [200, 136, 72] {
        let (chunks, mut shown) = sim.launch();
        shown.sort_unstable();
        assert_eq!(shown, [(1, 1), (2, 1), (3, 1), (9, 64)], "{left} rows are left");
        assert_eq!(sim.complete(&chunks, 50 * MS), [1, 2, 3]);
        (1..=3).for_each(|session| _ = sim.ask(session, 1));
    }
    let (chunks, shown) = sim.launch();
    assert_eq!(shown.len(), 4);
    assert!(sim.complete(&chunks, 50 * MS).contains(&9), "8 rows were left");
}

#[test]
fn prompts_alone_fill_the_batch_and_share_it() {
    let mut sim = sim();
    sim.ask(1, 1000);
    let (chunks, shown) = sim.launch();
    assert_eq!(shown, [(1, 256)]);
    sim.complete(&chunks, MS);
    sim.ask(2, 30);
    sim.ask(3, 500);
    let (chunks, shown) = sim.launch();
    assert_eq!(shown, [(2, 30), (3, 113), (1, 113)]);
    assert_eq!(sim.complete(&chunks, MS), [2]);
    sim.scheduler.gone(SessionId(2));
    assert_eq!(sim.launch().1, [(3, 128), (1, 128)]);
}

#[test]
fn many_that_decode_leave_rows_for_prompts_and_take_turns() {
    let mut sim = sim_with(Limits { rows: 40, prompt_rows_beside: 30, ..LIMITS });
    (1..=50).for_each(|session| _ = sim.ask(session, 1));
    sim.ask(60, 100);
    let (chunks, shown) = sim.launch();
    assert_eq!(shown[..24], (1..=24).map(|session| (session, 1)).collect::<Vec<_>>());
    assert_eq!(shown[24..], [(60, 16)]);
    sim.complete(&chunks, MS);
    (1..=24).for_each(|session| _ = sim.ask(session, 1));
    let (_, shown) = sim.launch();
    assert_eq!(shown[..2], [(25, 1), (26, 1)]);
}

#[test]
fn a_failed_batch_is_tried_one_by_one() {
    let mut sim = sim();
    sim.ask(1, 1);
    sim.ask(2, 300);
    sim.ask(3, 1);
    let (chunks, _) = sim.launch();
    sim.ask(4, 1);
    assert_eq!(sim.scheduler.failed(&chunks), None);
    let mut tried = Vec::new();
    for _ in 0..3 {
        let (chunks, shown) = sim.launch();
        assert_eq!(shown.len(), 1);
        tried.push(shown[0]);
        match shown[0].0 {
            3 => assert_eq!(sim.scheduler.failed(&chunks), Some(chunks[0].request)),
            _ => _ = sim.complete(&chunks, MS),
        }
    }
    tried.sort_unstable();
    assert_eq!(tried, [(1, 1), (2, 256), (3, 1)]);
    sim.scheduler.gone(SessionId(1));
    let (_, shown) = sim.launch();
    assert_eq!(shown, [(4, 1), (2, 44)], "from here on together again");
}

#[test]
fn a_session_is_in_one_batch_also_when_a_request_was_given_up() {
    let mut sim = sim();
    let first = sim.ask(1, 300);
    let (chunks, _) = sim.launch();
    sim.scheduler.cancel(first);
    sim.ask(1, 7);
    assert_eq!(sim.scheduler.next(sim.now), Decision::Idle);
    assert_eq!(sim.complete(&chunks, MS), [] as [u64; 0]);
    assert_eq!(sim.launch().1, [(1, 7)]);
    let waits = sim.ask(2, 5);
    sim.scheduler.cancel(waits);
    assert_eq!((sim.scheduler.next(sim.now), sim.scheduler.waiting()), (Decision::Idle, 0));
    let chunks = [ScheduledChunk { request: RequestId(201), rows: 7 }];
    assert_eq!(sim.scheduler.failed(&chunks), Some(RequestId(201)));
}

#[test]
fn batches_that_overlap_take_different_sessions() {
    let mut sim = sim();
    sim.ask(1, 1);
    let (first, _) = sim.launch();
    sim.ask(2, 1);
    let (second, shown) = sim.launch();
    assert_eq!(shown, [(2, 1)]);
    assert_eq!(sim.complete(&second, MS), [2]);
    sim.ask(2, 1);
    let (third, _) = sim.launch();
    assert_eq!(sim.complete(&first, MS), [1]);
    assert_eq!(sim.complete(&third, MS), [2]);
}

#[test]
fn a_batch_of_prompts_leaves_rows_for_those_that_decode_meanwhile() {
    let mut sim = sim();
    sim.scheduler.keep_decode_rows(32);
    sim.ask(1, 500);
    sim.ask(2, 500);
    let (prompts, shown) = sim.launch();
    assert_eq!(shown, [(1, 112), (2, 112)]);
    sim.ask(3, 300);
    assert_eq!(sim.scheduler.next(sim.now), Decision::Idle, "the rest is not for prompts");
    (11..=50).for_each(|session| _ = sim.ask(session, 1));
    let (tokens, shown) = sim.launch();
    assert_eq!(shown, (11..=42).map(|session| (session, 1)).collect::<Vec<_>>());
    assert_eq!(sim.scheduler.next(sim.now), Decision::Idle, "all rows are in a batch");
    sim.complete(&prompts, MS);
    let (_, shown) = sim.launch();
    assert_eq!(shown[..8], (43..=50).map(|session| (session, 1)).collect::<Vec<_>>());
    assert_eq!(shown[8..], [(3, 21), (1, 21), (2, 22)]);
    sim.complete(&tokens, MS);
}

/// Sessions with prompts of any length decode a few tokens each; batches may fail.
fn workload() -> impl Strategy<Value = (Limits, Vec<(usize, usize)>, Vec<bool>)> {
    let limits = (1usize..300, 1usize..100, 0usize..40);
    let limits = limits.prop_map(|(rows, prompt_rows_beside, decode_rows_kept)| Limits {
        rows: rows + decode_rows_kept,
        prompt_rows_beside,
        decode_rows_kept,
    });
    (limits, vec((1usize..600, 1usize..12), 1..40), vec(prop::bool::weighted(0.2), 1..30))
}

proptest! {
    #[test]
    fn everybody_is_served((limits, sessions, failures) in workload()) {
        let mut sim = sim_with(limits);
        let mut left: BTreeMap<u64, usize> = BTreeMap::new();
        for (session, (prompt, tokens)) in sessions.iter().enumerate() {
            sim.ask(session as u64, *prompt);
            left.insert(session as u64, *tokens);
        }
        let total: usize = sessions.iter().map(|(prompt, tokens)| prompt + tokens).sum();
        let mut failures = failures.into_iter();
        let (mut batches, mut failed) = (0, 0);
        while !left.is_empty() {
            let chunks = match sim.scheduler.next(sim.now) {
                Decision::Run(chunks) => chunks,
                Decision::WaitUntil(until) => {
                    prop_assert!(until > sim.now && until <= sim.now + PATIENCE_MAX);
                    sim.now = until;
                    continue;
                }
                Decision::Idle => panic!("{} sessions are left", left.len()),
            };
            batches += 1;
            prop_assert!(batches <= total + 42 * (failed + 1), "{batches} batches for {total} rows");
            let requests: BTreeSet<u64> = chunks.iter().map(|chunk| chunk.request.0 % 100).collect();
            prop_assert_eq!(requests.len(), chunks.len());
            prop_assert!(chunks.iter().map(|chunk| chunk.rows).sum::<usize>() <= limits.rows);
            prop_assert!(chunks.iter().all(|chunk| chunk.rows > 0) && !chunks.is_empty());
            if failures.next() == Some(true) && chunks.len() > 1 {
                failed += 1;
                prop_assert_eq!(sim.scheduler.failed(&chunks), None);
                continue;
            }
            for session in sim.complete(&chunks, 3 * MS) {
                let tokens = left.get_mut(&session).unwrap();
                *tokens -= 1;
                match *tokens {
                    0 => {
                        left.remove(&session);
                        sim.scheduler.gone(SessionId(session));
                    }
                    _ => _ = sim.ask(session, 1),
                }
            }
        }
        prop_assert_eq!((sim.scheduler.waiting(), sim.scheduler.next(sim.now)), (0, Decision::Idle));
    }

    /// A prompt's rows per batch never fall below its share while sessions decode, nor do theirs wait.
    #[test]
    fn neither_prompts_nor_tokens_starve(prompt in 100usize..2000, decoding in 1u64..30) {
        let mut sim = sim();
        sim.ask(99, prompt);
        (1..=decoding).for_each(|session| _ = sim.ask(session, 1));
        for _ in 0..prompt.div_ceil(LIMITS.prompt_rows_beside) {
            let (chunks, shown) = sim.launch();
            prop_assert_eq!(shown.len() as u64, decoding + 1);
            for session in sim.complete(&chunks, MS) {
                if session != 99 {
                    sim.ask(session, 1);
                }
            }
        }
        sim.scheduler.gone(SessionId(99));
        prop_assert_eq!(sim.launch().1.len() as u64, decoding);
    }
}
