//! Tells the log when gossip takes the leader for dead, so that another one is elected without waiting for a silence.

use super::MeshView;

/// Watches the leader until the node stops.
pub async fn follow(view: MeshView) {
    let (mut peers, mut leader) = (view.gossip().peers(), view.log().leader());
    loop {
        peers.borrow_and_update();
        let known = *leader.borrow_and_update();
        if let Some(gone) = known.filter(|leader| view.down().contains(leader)) {
            view.log().suspect(gone);
        }
        let changed = tokio::select! {
            changed = peers.changed() => changed,
            changed = leader.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}
