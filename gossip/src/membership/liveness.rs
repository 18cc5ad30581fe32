//! A failure detector that is quick about dead members and patient with slow ones.
//!
//! Owns: per member its [`Liveness`], when it was last heard, and when to dial it next.
//! Invariants: anything heard from a connected member makes it up; nothing waits on a connection of a member that is down
//! (`Close` comes with the verdict); two dials are never closer together than the backoff.
//! Deliberately does not know: addresses, sockets, gossip. `now` and the generator are arguments.
//!
//! Two kinds of evidence weigh differently. A refused connection is decisive: no process listens on that machine, so a lost
//! connection followed by two refusals is death, within a quarter of a second. Silence is weak, because a node that
//! computes on shared cores can be mute for a while: it takes seconds to become suspicion and then the verdict, and time in
//! which this process itself did not run does not count. A suspect member is dialled anew beside its old connection,
//! because a transport over UDP does not report a killed process, whereas a refusal over TCP does.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use libp2p::PeerId;
use rand::Rng;

/// What the mesh may expect of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Liveness {
    /// Heard a moment ago.
    Up,
    /// Silent, or without a connection: may be slow, may be gone.
    Suspect,
    /// Gone. Requests to it fail at once until it is heard again.
    Down,
}

/// When silence and refusals become verdicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thresholds {
    /// Silence after which a member is suspect; several times the ping interval. Default 2.5 s.
    pub suspect_after: Duration,
    /// Silence after which a member is down; above `suspect_after`. Default 6 s.
    pub down_after: Duration,
    /// Refused connections in a row after which a suspect member is down. Default 2: one could fall between
    /// the two listens of a restart.
    pub refusals_down: u32,
    /// Pause before the second dial; doubled with each further one. Default 100 ms.
    pub redial_first: Duration,
    /// Longest pause between dials. Default 5 s.
    pub redial_max: Duration,
    /// When two ticks are further apart than this, this process was not running, and the time between is not
    /// counted as silence. Default 1 s.
    pub unwatched_after: Duration,
}

impl Default for Thresholds {
    fn default() -> Thresholds {
        Thresholds {
            suspect_after: Duration::from_millis(2500),
            down_after: Duration::from_secs(6),
            refusals_down: 2,
            redial_first: Duration::from_millis(100),
            redial_max: Duration::from_secs(5),
            unwatched_after: Duration::from_secs(1),
        }
    }
}

#[derive(Clone, Debug)]
pub enum Input {
    /// The members to watch, this node excluded.
    Members(BTreeSet<PeerId>),
    /// Any byte that only this member can have sent.
    Heard(PeerId),
    /// A connection was established, by either side.
    Connected(PeerId),
    /// The last connection closed.
    ConnectionLost(PeerId),
    /// A dial failed. `refused`: a machine answered that no process, or another peer, listens there.
    DialFailed {
        peer: PeerId,
        refused: bool,
    },
    /// A new address of it is known.
    AddressLearned(PeerId),
    /// It said that it is ending.
    Left(PeerId),
    Tick,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// `attempt` counts from 0 since the last connection.
    Dial {
        peer: PeerId,
        attempt: u32,
    },
    /// Close every connection to it.
    Close(PeerId),
    Changed(PeerId, Liveness),
}

#[derive(Clone, Debug)]
struct Watched {
    liveness: Liveness,
    connected: bool,
    heard: Instant,
    refusals: u32,
    attempt: u32,
    dialing: bool,
    dial_at: Option<Instant>,
}

#[derive(Debug)]
pub struct Detector {
    thresholds: Thresholds,
    watched: BTreeMap<PeerId, Watched>,
    ticked: Instant,
    out: Vec<Output>,
}

impl Detector {
    pub fn new(thresholds: Thresholds, now: Instant) -> Detector {
        Detector { thresholds, watched: BTreeMap::new(), ticked: now, out: Vec::new() }
    }

    /// `None` for a peer that is not watched.
    pub fn liveness(&self, peer: &PeerId) -> Option<Liveness> {
        self.watched.get(peer).map(|watched| watched.liveness)
    }

    pub fn handle(&mut self, input: Input, now: Instant, rng: &mut impl Rng) -> Vec<Output> {
        match input {
            Input::Members(members) => self.set_members(members, now),
            Input::Heard(peer) => self.heard(peer, now),
            Input::Connected(peer) => self.connected(peer, now),
            Input::ConnectionLost(peer) => self.connection_lost(peer),
            Input::DialFailed { peer, refused } => self.dial_failed(peer, refused, now, rng),
            Input::AddressLearned(peer) => self.address_learned(peer),
            Input::Left(peer) => {
                self.declare(peer, Liveness::Down);
                self.retry_later(peer, self.thresholds.redial_max, now);
            }
            Input::Tick => self.tick(now),
        }
        std::mem::take(&mut self.out)
    }

    fn set_members(&mut self, members: BTreeSet<PeerId>, now: Instant) {
        self.watched.retain(|peer, _| members.contains(peer));
        for peer in members {
            if self.watched.contains_key(&peer) {
                continue;
            }
            // Suspect, not down: it was not dialled yet, and its silence counts from here.
            let watched = Watched {
                liveness: Liveness::Suspect,
                connected: false,
                heard: now,
                refusals: 0,
                attempt: 0,
                dialing: false,
                dial_at: None,
            };
            self.watched.insert(peer, watched);
            self.out.push(Output::Changed(peer, Liveness::Suspect));
            self.dial_afresh(peer);
        }
    }

    fn heard(&mut self, peer: PeerId, now: Instant) {
        let Some(watched) = self.watched.get_mut(&peer) else {
            return;
        };
        // Late input from a closed connection is no sign of life.
        if !watched.connected {
            return;
        }
        watched.heard = now;
        watched.refusals = 0;
        watched.attempt = 0;
        watched.dial_at = None;
        self.declare(peer, Liveness::Up);
    }

    fn connected(&mut self, peer: PeerId, now: Instant) {
        let Some(watched) = self.watched.get_mut(&peer) else {
            return;
        };
        watched.connected = true;
        watched.dialing = false;
        self.heard(peer, now);
    }

    fn connection_lost(&mut self, peer: PeerId) {
        let Some(watched) = self.watched.get_mut(&peer) else {
            return;
        };
        if !watched.connected {
            return;
        }
        watched.connected = false;
        self.declare(peer, Liveness::Suspect);
        self.dial_afresh(peer);
    }

    fn address_learned(&mut self, peer: PeerId) {
        let Some(watched) = self.watched.get_mut(&peer) else {
            return;
        };
        if !watched.connected {
            // A dial of the old addresses may be under way and may take long to fail. This one does not wait for it.
            watched.dialing = false;
            self.dial_afresh(peer);
        }
    }

    fn dial_failed(&mut self, peer: PeerId, refused: bool, now: Instant, rng: &mut impl Rng) {
        let Some(watched) = self.watched.get_mut(&peer) else {
            return;
        };
        watched.dialing = false;
        if watched.connected && watched.liveness == Liveness::Up {
            return; // heard meanwhile
        }
        watched.attempt = watched.attempt.saturating_add(1);
        watched.refusals = if refused { watched.refusals.saturating_add(1) } else { 0 };
        let dead = watched.refusals >= self.thresholds.refusals_down;
        let pause = self.backoff(peer, rng);
        if dead {
            self.declare(peer, Liveness::Down);
        }
        self.retry_later(peer, pause, now);
    }

    fn tick(&mut self, now: Instant) {
        let since = now.saturating_duration_since(self.ticked);
        self.ticked = now;
        if since > self.thresholds.unwatched_after {
            self.watched.values_mut().for_each(|watched| watched.heard += since);
        }
        for peer in self.watched.keys().copied().collect::<Vec<_>>() {
            let watched = &self.watched[&peer];
            let silence = now.saturating_duration_since(watched.heard);
            if silence >= self.thresholds.down_after {
                if watched.liveness != Liveness::Down {
                    self.declare(peer, Liveness::Down);
                    self.retry_later(peer, self.thresholds.redial_first, now);
                }
            } else if silence >= self.thresholds.suspect_after && watched.liveness == Liveness::Up {
                self.declare(peer, Liveness::Suspect);
                self.dial_afresh(peer);
            }
            let watched = &self.watched[&peer];
            if watched.dial_at.is_some_and(|at| at <= now) {
                self.dial(peer);
            }
        }
    }

    fn declare(&mut self, peer: PeerId, liveness: Liveness) {
        let Some(watched) = self.watched.get_mut(&peer) else {
            return;
        };
        if watched.liveness == liveness {
            return;
        }
        watched.liveness = liveness;
        if liveness == Liveness::Down && std::mem::take(&mut watched.connected) {
            self.out.push(Output::Close(peer));
        }
        self.out.push(Output::Changed(peer, liveness));
    }

    /// Looks for the peer at once, with a clean record of attempts.
    fn dial_afresh(&mut self, peer: PeerId) {
        let Some(watched) = self.watched.get_mut(&peer) else {
            return;
        };
        watched.attempt = 0;
        watched.refusals = 0;
        self.dial(peer);
    }

    fn dial(&mut self, peer: PeerId) {
        let Some(watched) = self.watched.get_mut(&peer) else {
            return;
        };
        watched.dial_at = None;
        if !std::mem::replace(&mut watched.dialing, true) {
            self.out.push(Output::Dial { peer, attempt: watched.attempt });
        }
    }

    fn retry_later(&mut self, peer: PeerId, pause: Duration, now: Instant) {
        let Some(watched) = self.watched.get_mut(&peer) else {
            return;
        };
        if !watched.dialing {
            watched.dial_at = Some(now + pause);
        }
    }

    /// The pause doubles with each attempt up to the cap. It varies by a quarter, so that nodes that lost the same peer do
    /// not dial it in step.
    fn backoff(&self, peer: PeerId, rng: &mut impl Rng) -> Duration {
        let attempt = self.watched[&peer].attempt.saturating_sub(1).min(16);
        let pause = self.thresholds.redial_first.saturating_mul(1 << attempt);
        pause.mul_f64(rng.random_range(0.75..1.25)).min(self.thresholds.redial_max)
    }
}

#[cfg(test)]
#[path = "liveness_tests.rs"]
mod tests;
