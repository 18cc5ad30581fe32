//! From router logits to routes.
//!
//! Pure: softmax over all experts, the best `num_experts_per_tok`, optionally normalised to sum 1. The invariant: ties
//! go to the lower index and a row's routes come in ascending expert index, because that is the order in which their
//! outputs are added everywhere.

use serde::{Deserialize, Serialize};

use coel_kernels::math;

/// One expert chosen for a row, and the weight of its output.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Route {
    pub expert: u16,
    pub weight: f32,
}

/// Routes of one row from its logits `[num_experts]`, overwriting them. Exactly `top_k` routes, ascending.
pub fn route(logits: &mut [f32], top_k: usize, norm_topk_prob: bool) -> Vec<Route> {
    math::softmax(logits);
    let mut order: Vec<u16> = (0..logits.len() as u16).collect();
    // total_cmp: a NaN (a broken weight) still gives some routes, and the NaN shows in the logits.
    order.sort_by(|a, b| logits[usize::from(*b)].total_cmp(&logits[usize::from(*a)]).then(a.cmp(b)));
    order.truncate(top_k);
    let total: f32 = order.iter().map(|expert| logits[usize::from(*expert)]).sum();
    order.sort_unstable();
    let route = |expert: u16| {
        let weight = logits[usize::from(expert)];
        Route { expert, weight: if norm_topk_prob { weight / total } else { weight } }
    };
    order.into_iter().map(route).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(logits: &[f32], k: usize) -> Vec<u16> {
        route(&mut logits.to_vec(), k, false).iter().map(|route| route.expert).collect()
    }

    #[test]
    fn the_best_in_ascending_order() {
        assert_eq!(chosen(&[0.0, 3.0, 1.0, 2.0], 2), [1, 3]);
        assert_eq!(chosen(&[5.0, 1.0, 2.0, 4.0], 3), [0, 2, 3]);
    }

    #[test]
    fn ties_go_to_the_lower_index() {
        assert_eq!(chosen(&[1.0, 1.0, 1.0, 1.0], 2), [0, 1]);
        assert_eq!(chosen(&[0.0, 1.0, 2.0, 1.0], 2), [1, 2]);
    }

    #[test]
    fn weights_are_probabilities_or_their_shares() {
        let plain = route(&mut [1.0, 1.0, 1.0, 1.0], 2, false);
        assert!(plain.iter().all(|route| route.weight == 0.25));
        let normed = route(&mut [1.0, 1.0, 1.0, 1.0], 2, true);
        assert!(normed.iter().all(|route| route.weight == 0.5));
    }

    #[test]
    fn a_broken_router_does_not_panic() {
        assert_eq!(route(&mut [f32::NAN; 4], 2, true).len(), 2);
    }
}
