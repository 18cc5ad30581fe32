//! Killing and suspending nodes: between questions, in the middle of an answer, and until too few are left.
//!
//! One mesh goes through all the deaths, since a node that comes back must serve as before. The tests wait for states that the
//! nodes report, and for answers; the one fixed time is the length of a fault.

use std::time::Duration;

use coel_node::service::ModelInfo;
use coel_node::status::Status;
use coel_testnet::ask::{self, AskError};
use coel_testnet::job::settle;
use coel_testnet::mesh::Mesh;
use coel_testnet::node::Start;
use coel_testnet::progress::Progress;
use tokio::sync::Notify;

use crate::golden::Alone;
use crate::support::{MODEL, QUESTION, coel_at, continue_tokens, fixture, mesh, turn, until};

const ANSWER: &str = "The capital of France is Paris.";
/// Long enough to kill a node well before the answer ends.
const LONG_TOKENS: usize = 120;
/// Pieces of text after which a node is killed or suspended.
const PIECES: usize = 10;
/// How long a suspended node is silent: longer than it takes to be taken for dead.
const SILENCE: Duration = Duration::from_secs(10);

#[tokio::test]
async fn any_one_of_three_may_die_at_any_time() {
    let _turn = turn().await;
    let (mut mesh, job, budget) = mesh(3, 70).await;
    let wanted = job.wanted(&budget);
    let alone = Alone::new();
    let prompt = alone.story();
    let whole = continue_tokens(&mesh.nodes()[0].api().unwrap(), &prompt, LONG_TOKENS, |_| ()).await.unwrap();
    assert!(whole.tokens.len() >= 4 * PIECES, "{} tokens", whole.tokens.len());

    for victim in 0..3 {
        let home = (victim + 1) % 3;
        let api = mesh.nodes()[home].api().unwrap();

        // Between two questions. The second one comes before any node can have noticed the death.
        assert_eq!(question(&api).await, ANSWER);
        mesh.node(victim).kill();
        assert_eq!(question(&api).await, ANSWER, "right after the death of {}", mesh.nodes()[victim].name());
        survivors_carry_on(&mut mesh, victim).await;
        assert_eq!(question(&api).await, ANSWER, "after the death of {}", mesh.nodes()[victim].name());
        back_in_service(&mut mesh, victim, wanted).await;

        // In the middle of an answer.
        let mut pieces = 0;
        let answer = continue_tokens(&api, &prompt, LONG_TOKENS, |_| {
            pieces += 1;
            if pieces == PIECES {
                mesh.node(victim).kill();
            }
        });
        let answer = answer.await.unwrap();
        assert!(!mesh.node(victim).is_running());
        assert_eq!((&answer.tokens, &answer.text), (&whole.tokens, &whole.text), "{}", mesh.nodes()[victim].name());
        survivors_carry_on(&mut mesh, victim).await;
        if victim == 2 {
            its_experts_are_placed_elsewhere(&mut mesh, victim).await;
        }
        back_in_service(&mut mesh, victim, wanted).await;
    }

    an_answer_waits_for_its_experts_and_a_minority_agrees_on_nothing(&mut mesh, &prompt).await;
}

async fn question(api: &str) -> String {
    ask::chat(api, MODEL, QUESTION, |_| ()).await.unwrap().text
}

/// The two surviving nodes have a leader and serve every expert.
async fn survivors_carry_on(mesh: &mut Mesh, victim: usize) {
    let dead = mesh.nodes()[victim].name().to_owned();
    for index in (0..3).filter(|&index| index != victim) {
        let what = format!("service without {dead}");
        let carried_on = until(mesh, index, &what, |status| {
            let leader = status.nodes.iter().find(|node| Some(node.node_id) == status.leader);
            let gone = status.nodes.iter().find(|node| node.name == dead);
            status.coverage == 1.0
                && status.readiness.ready
                && leader.is_some_and(|leader| leader.name != dead)
                && gone.is_some_and(|gone| gone.liveness != "up")
        });
        carried_on.await;
    }
}

/// The experts of a node that stays away are placed elsewhere.
async fn its_experts_are_placed_elsewhere(mesh: &mut Mesh, victim: usize) {
    let dead = mesh.nodes()[victim].name().to_owned();
    let what = format!("a new placement without {dead}");
    let replaced = until(mesh, (victim + 1) % 3, &what, |status| {
        let gone = status.nodes.iter().find(|node| node.name == dead);
        status.coverage == 1.0 && gone.is_some_and(|gone| gone.experts == 0)
    });
    replaced.await;
}

#[tokio::test]
async fn a_short_absence_makes_nothing_less_exact() {
    let _turn = turn().await;
    // Two of the three nodes have no room for all experts at exact precision.
    let (mut mesh, job, budget) = mesh(3, 40).await;
    let wanted = job.wanted(&budget);
    let all_exact = |status: &Status| status.nodes.iter().all(|node| node.precisions.q4 + node.precisions.q8 == 0);
    until(&mut mesh, 0, "everything exactly", all_exact).await;
    let before = mesh.nodes()[1].status().await.unwrap();
    let away = mesh.nodes()[2].name().to_owned();
    mesh.node(2).kill();
    // The leader has planned without the absent node, and has left the placement as it is.
    let led = until(&mut mesh, 0, "a leader that is there", |status| {
        status.leader.is_some_and(|leader| {
            status.nodes.iter().any(|node| node.node_id == leader && node.name != away && node.liveness != "down")
        })
    });
    let led = led.await;
    let leader = mesh.nodes().iter().position(|node| {
        led.nodes.iter().any(|status| Some(status.node_id) == led.leader && status.name == node.name())
    });
    let awaited = |status: &Status| {
        let is_awaited = |node: &&coel_node::status::NodeStatus| status.awaited.contains(&node.node_id);
        status.nodes.iter().filter(is_awaited).any(|node| node.name == away)
    };
    until(&mut mesh, leader.unwrap(), "the wait for the absent node", awaited).await;
    mesh.node(2).start(&Start::Again).await.unwrap();
    if let Err(error) = settle(&mut mesh, wanted, &mut Progress::new()).await {
        panic!("{error:#}\n{}", mesh.last_words().await);
    }
    let after = mesh.nodes()[1].status().await.unwrap();
    assert!(all_exact(&after), "{:?}", after.nodes);
    let on_survivors = |status: &Status| status.nodes[..2].iter().map(|node| node.experts).collect::<Vec<_>>();
    assert_eq!(on_survivors(&after), on_survivors(&before));
    assert_eq!(after.own.bytes_fetched, before.own.bytes_fetched);
    assert_eq!(question(&mesh.nodes()[2].api().unwrap()).await, ANSWER);
}

#[tokio::test]
async fn an_answer_outlives_the_silence_of_the_only_holder_of_an_expert() {
    let _turn = turn().await;
    let (mut mesh, ..) = mesh(3, 40).await;
    let all_exact = |status: &Status| status.nodes.iter().all(|node| node.precisions.q4 + node.precisions.q8 == 0);
    let status = until(&mut mesh, 0, "everything exactly", all_exact).await;
    let mut sole = status.placement.values().filter(|replicas| replicas.len() == 1).map(|replicas| replicas[0].node);
    let sole = sole.find(|node| *node != status.node_id).expect("an expert that one other node holds");
    let name = &status.nodes.iter().find(|node| node.node_id == sole).unwrap().name;
    let holder = mesh.nodes().iter().position(|node| node.name() == name).unwrap();
    let (api, prompt) = (mesh.nodes()[0].api().unwrap(), Alone::new().story());
    let whole = continue_tokens(&api, &prompt, LONG_TOKENS, |_| ()).await.unwrap();

    let (begun, mut pieces) = (Notify::new(), 0);
    let answer = continue_tokens(&api, &prompt, LONG_TOKENS, |_| {
        pieces += 1;
        if pieces == PIECES {
            begun.notify_one();
        }
    });
    let silence = async {
        begun.notified().await;
        mesh.node(holder).suspend();
        let waits = until(&mut mesh, 0, "an answer that waits", |status| status.own.answers_waiting == 1);
        tokio::join!(waits, tokio::time::sleep(SILENCE));
        mesh.node(holder).resume();
    };
    let (answer, ()) = tokio::join!(answer, silence);
    let answer = answer.unwrap();
    assert_eq!((&answer.tokens, &answer.text), (&whole.tokens, &whole.text));
    until(&mut mesh, 0, "no answer that waits", |status| status.own.answers_waiting == 0).await;
}

async fn back_in_service(mesh: &mut Mesh, victim: usize, wanted: coel_testnet::settle::Wanted) {
    let before = mesh.nodes()[(victim + 1) % 3].status().await.unwrap();
    mesh.node(victim).start(&Start::Again).await.unwrap();
    if let Err(error) = settle(mesh, wanted, &mut Progress::new()).await {
        panic!("{error:#}\n{}", mesh.last_words().await);
    }
    let status = mesh.nodes()[victim].status().await.unwrap();
    let was = before.nodes.iter().find(|node| node.name == status.name).unwrap();
    assert_eq!((status.node_id, &status.peer_id), (was.node_id, &was.peer_id), "it is the same node");
    let api = mesh.nodes()[victim].api().unwrap();
    assert_eq!(question(&api).await, ANSWER, "asked of {}", status.name);
}

/// With two of three nodes gone at once, some experts have no replica left, and the remaining node has no majority.
async fn an_answer_waits_for_its_experts_and_a_minority_agrees_on_nothing(mesh: &mut Mesh, prompt: &[u32]) {
    let api = mesh.nodes()[0].api().unwrap();
    let (begun, mut pieces) = (Notify::new(), 0);
    let answer = continue_tokens(&api, prompt, LONG_TOKENS, |_| {
        pieces += 1;
        if pieces == PIECES {
            begun.notify_one();
        }
    });
    let deaths = async {
        begun.notified().await;
        mesh.node(1).kill();
        mesh.node(2).kill();
        until(mesh, 0, "an answer that waits", |status| status.own.answers_waiting == 1).await
    };
    tokio::select! {
        answer = answer => panic!("nobody holds the experts of {answer:?}"),
        _ = deaths => {}
    }
    // The client has gone.
    until(mesh, 0, "no answer that waits", |status| status.own.answers_waiting == 0).await;
    let status = until(mesh, 0, "coverage that counts the dead", |status| !status.readiness.ready).await;
    assert!(status.readiness.coverage < 1.0, "{:?}", status.readiness);
    let refused = ask::chat(&api, MODEL, QUESTION, |_| ()).await.unwrap_err();
    assert!(matches!(refused, AskError::Refused { status: 503, .. }), "{refused}");
    let data = mesh.nodes()[0].data();
    let model = fixture();
    let import = ["model", "import", model.to_str().unwrap()];
    for command in [&["invite"][..], &["leave"], &["forget", "node-2"], &["model", "precision", "q8"], &import] {
        coel_at(&data, command).await.refused(1, &["1 of 3 voters can be reached, and 2 must be"]);
    }
    // The node still reports what it knows.
    assert!(coel_at(&data, ["status"]).await.printed().contains("node-2"));
    let models = coel_at(&data, ["model", "ls", "--json"]).await;
    let models: Vec<ModelInfo> = serde_json::from_str(models.printed()).unwrap();
    assert_eq!(models[0].name, MODEL);
}
