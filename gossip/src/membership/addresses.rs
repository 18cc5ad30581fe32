//! The addresses at which members may be found.
//!
//! Owns: per peer, the addresses that the mesh gave and those learned from identify, mDNS and connections.
//! Invariants: everything is bounded; no address carries a `/p2p` part; an address that leads back to this machine is
//! learned only of a peer that runs on this machine.
//! Deliberately does not know: which peers are connected, or when to dial.
//!
//! The last invariant matters because every machine has 127.0.0.1, and all machines with containers share the same bridge
//! addresses: learned of a peer elsewhere, such an address leads back to this node or to a neighbour. A mesh on one
//! machine, on the other hand, has nothing but loopback.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;

use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId};

/// Most learned addresses of one peer; the one that was confirmed longest ago makes room.
const LEARNED_MAX: usize = 16;
/// Most strangers whose addresses are remembered, in case they become members.
const STRANGERS_MAX: usize = 256;

#[derive(Debug, Default)]
pub(crate) struct AddressBook {
    members: BTreeMap<PeerId, Entry>,
    strangers: BTreeMap<PeerId, Entry>,
    /// Strangers by age, oldest first.
    order: VecDeque<PeerId>,
    /// IP addresses of this machine that it listens on.
    own: BTreeSet<IpAddr>,
}

#[derive(Debug, Default)]
struct Entry {
    given: Vec<Multiaddr>,
    /// Most recently confirmed first.
    learned: VecDeque<Multiaddr>,
}

impl Entry {
    fn addresses(&self) -> Vec<Multiaddr> {
        let given = self.given.iter().filter(|address| !self.learned.contains(address));
        self.learned.iter().chain(given).cloned().collect()
    }

    /// Returns whether the address was unknown.
    fn learn(&mut self, address: Multiaddr) -> bool {
        let before = self.learned.iter().position(|known| *known == address);
        let unknown = before.is_none() && !self.given.contains(&address);
        if let Some(before) = before {
            self.learned.remove(before);
        }
        self.learned.push_front(address);
        self.learned.truncate(LEARNED_MAX);
        unknown
    }
}

/// The IP address at the head of a multiaddress, if it is written as one.
pub(crate) fn ip(address: &Multiaddr) -> Option<IpAddr> {
    match address.iter().next()? {
        Protocol::Ip4(ip) => Some(ip.into()),
        Protocol::Ip6(ip) => Some(ip.into()),
        _ => None,
    }
}

pub(crate) fn is_tcp(address: &Multiaddr) -> bool {
    address.iter().any(|part| matches!(part, Protocol::Tcp(_)))
}

/// Splits the trailing `/p2p/ID` off, if there is one.
pub(crate) fn split_peer(address: &Multiaddr) -> (Multiaddr, Option<PeerId>) {
    let mut address = address.clone();
    match address.pop() {
        Some(Protocol::P2p(peer)) => (address, Some(peer)),
        Some(other) => (address.with(other), None),
        None => (address, None),
    }
}

impl AddressBook {
    /// An address this node listens on.
    pub fn add_own(&mut self, address: &Multiaddr) {
        self.own.extend(ip(address));
    }

    /// Replaces the members and the addresses that the mesh gives for them. Returns the members with a new address.
    pub fn set_members(&mut self, members: &BTreeMap<PeerId, Vec<Multiaddr>>) -> Vec<PeerId> {
        let mut before = std::mem::take(&mut self.members);
        let mut news = Vec::new();
        for (peer, addresses) in members {
            let stranger = || {
                self.order.retain(|known| known != peer);
                self.strangers.remove(peer)
            };
            let mut entry = before.remove(peer).or_else(stranger).unwrap_or_default();
            let known = entry.addresses();
            entry.given = addresses.iter().filter_map(|address| stripped(*peer, address)).collect();
            if entry.given.iter().any(|address| !known.contains(address)) {
                news.push(*peer);
            }
            self.members.insert(*peer, entry);
        }
        news
    }

    /// An address that was proven by an outgoing connection. Returns whether it was unknown.
    pub fn confirm(&mut self, peer: PeerId, address: &Multiaddr) -> bool {
        stripped(peer, address).is_some_and(|address| self.entry(peer).learn(address))
    }

    /// The addresses that a connected peer says it listens on; `remote` is the far end of its connection. Returns whether
    /// any was unknown.
    pub fn identified(&mut self, peer: PeerId, listens: &[Multiaddr], remote: &Multiaddr) -> bool {
        let neighbour = ip(remote).is_some_and(|ip| self.is_here(ip));
        self.learn_all(peer, listens, neighbour)
    }

    /// The addresses that a peer announces on the local network. Returns whether any was unknown.
    pub fn announced(&mut self, peer: PeerId, addresses: &[Multiaddr]) -> bool {
        // An announcement does not say where it comes from. The peer is on this machine if every address that could lead
        // elsewhere leads here.
        let mut elsewhere = addresses.iter().filter_map(ip).filter(|ip| !ip.is_loopback()).peekable();
        let neighbour = elsewhere.peek().is_some() && elsewhere.all(|ip| self.own.contains(&ip));
        self.learn_all(peer, addresses, neighbour)
    }

    fn learn_all(&mut self, peer: PeerId, addresses: &[Multiaddr], neighbour: bool) -> bool {
        let mut news = false;
        // Bounded before anything is stored: a peer can claim any number of addresses.
        for address in addresses.iter().take(LEARNED_MAX) {
            let usable = ip(address).is_none_or(|ip| !ip.is_unspecified() && (neighbour || !self.is_here(ip)));
            if let Some(address) = stripped(peer, address).filter(|_| usable) {
                news |= self.entry(peer).learn(address);
            }
        }
        news
    }

    /// Forgets an address of `peer` at which another peer answers.
    pub fn forget(&mut self, peer: &PeerId, address: &Multiaddr) {
        let (address, _) = split_peer(address);
        if let Some(entry) = self.members.get_mut(peer).or_else(|| self.strangers.get_mut(peer)) {
            entry.learned.retain(|known| *known != address);
            entry.given.retain(|known| *known != address);
        }
    }

    /// Every address of `peer`, the most recently proven first.
    pub fn of(&self, peer: &PeerId) -> Vec<Multiaddr> {
        self.members.get(peer).or_else(|| self.strangers.get(peer)).map(Entry::addresses).unwrap_or_default()
    }

    /// The addresses worth dialling at the `attempt`-th try since the last connection. The first tries go to TCP alone where
    /// there is any: over TCP the kernel of the other machine reports at once that a process is gone, whereas a transport
    /// over UDP waits for a timeout.
    pub fn to_dial(&self, peer: &PeerId, attempt: u32) -> Vec<Multiaddr> {
        let mut addresses = self.of(peer);
        if attempt < 2 && addresses.iter().any(is_tcp) {
            addresses.retain(is_tcp);
        }
        addresses
    }

    fn is_here(&self, ip: IpAddr) -> bool {
        ip.is_loopback() || self.own.contains(&ip)
    }

    fn entry(&mut self, peer: PeerId) -> &mut Entry {
        if self.members.contains_key(&peer) {
            return self.members.get_mut(&peer).expect("looked up the line before");
        }
        if !self.strangers.contains_key(&peer) {
            if self.order.len() >= STRANGERS_MAX
                && let Some(oldest) = self.order.pop_front()
            {
                self.strangers.remove(&oldest);
            }
            self.order.push_back(peer);
        }
        self.strangers.entry(peer).or_default()
    }
}

/// The address without its `/p2p` part; `None` if that part names another peer, or if the address goes through a relay.
fn stripped(peer: PeerId, address: &Multiaddr) -> Option<Multiaddr> {
    let (address, named) = split_peer(address);
    let relayed = address.iter().any(|part| matches!(part, Protocol::P2pCircuit));
    (!relayed && !address.is_empty() && named.is_none_or(|named| named == peer)).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(texts: &[&str]) -> Vec<Multiaddr> {
        texts.iter().map(|text| text.parse().expect("a multiaddress")).collect()
    }

    fn book_at(own: &[&str]) -> AddressBook {
        let mut book = AddressBook::default();
        addresses(own).iter().for_each(|address| book.add_own(address));
        book
    }

    const HERE: [&str; 3] = ["/ip4/127.0.0.1/tcp/1", "/ip4/192.168.1.4/tcp/1", "/ip4/172.17.0.1/tcp/1"];
    const THERE: [&str; 3] = ["/ip4/127.0.0.1/tcp/9", "/ip4/192.168.1.5/tcp/9", "/ip4/172.17.0.1/tcp/9"];

    #[test]
    fn loopback_and_bridge_addresses_of_another_machine_are_not_learned() {
        let peer = PeerId::random();
        let mut book = book_at(&HERE);
        book.announced(peer, &addresses(&THERE));
        assert_eq!(book.of(&peer), addresses(&["/ip4/192.168.1.5/tcp/9"]));
        let mut book = book_at(&HERE);
        book.identified(peer, &addresses(&THERE), &addresses(&["/ip4/192.168.1.5/tcp/40000"])[0]);
        assert_eq!(book.of(&peer), addresses(&["/ip4/192.168.1.5/tcp/9"]));
    }

    #[test]
    fn a_neighbour_on_the_same_machine_is_found_over_loopback() {
        let peer = PeerId::random();
        let mut book = book_at(&HERE);
        book.announced(peer, &addresses(&["/ip4/127.0.0.1/tcp/9", "/ip4/192.168.1.4/tcp/9"]));
        assert_eq!(book.of(&peer).len(), 2);
        let mut book = book_at(&["/ip4/127.0.0.1/tcp/1"]);
        let remote = &addresses(&["/ip4/127.0.0.1/tcp/40000"])[0];
        assert!(book.identified(peer, &addresses(&["/ip4/127.0.0.1/tcp/9"]), remote));
        assert!(!book.identified(peer, &addresses(&["/ip4/127.0.0.1/tcp/9"]), remote), "nothing new");
    }

    #[test]
    fn addresses_that_lead_nowhere_or_to_somebody_else_are_not_learned() {
        let (peer, other) = (PeerId::random(), PeerId::random());
        let mut book = AddressBook::default();
        let named = |peer: PeerId| format!("/ip4/10.0.0.1/tcp/1/p2p/{peer}");
        let claimed = addresses(&["/ip4/0.0.0.0/tcp/1", &named(other), &named(peer)]);
        book.announced(peer, &claimed);
        assert_eq!(book.of(&peer), addresses(&["/ip4/10.0.0.1/tcp/1"]));
    }

    #[test]
    fn tcp_is_dialled_first_and_everything_later() {
        let peer = PeerId::random();
        let mut book = AddressBook::default();
        let both = addresses(&["/ip4/10.0.0.1/udp/1/quic-v1", "/ip4/10.0.0.1/tcp/1"]);
        book.set_members(&BTreeMap::from([(peer, both.clone())]));
        assert_eq!(book.to_dial(&peer, 0), both[1..]);
        assert_eq!(book.to_dial(&peer, 2), both);
        book.set_members(&BTreeMap::from([(peer, both[..1].to_vec())]));
        assert_eq!(book.to_dial(&peer, 0), both[..1]);
    }

    #[test]
    fn given_addresses_are_replaced_and_news_is_told() {
        let peer = PeerId::random();
        let mut book = AddressBook::default();
        let [old, new] = ["/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.1/tcp/2"].map(|text| addresses(&[text]));
        assert_eq!(book.set_members(&BTreeMap::from([(peer, old.clone())])), [peer]);
        assert_eq!(book.set_members(&BTreeMap::from([(peer, old)])), []);
        assert_eq!(book.set_members(&BTreeMap::from([(peer, new.clone())])), [peer]);
        assert_eq!(book.of(&peer), new);
        book.forget(&peer, &new[0]);
        assert_eq!(book.of(&peer), []);
    }

    #[test]
    fn a_stranger_that_becomes_a_member_is_not_forgotten_but_a_crowd_of_strangers_is() {
        let peer = PeerId::random();
        let mut book = AddressBook::default();
        let address = &addresses(&["/ip4/10.0.0.1/tcp/1"])[0];
        book.confirm(peer, address);
        book.set_members(&BTreeMap::from([(peer, vec![])]));
        for port in 1..=STRANGERS_MAX + 10 {
            let port = port as u16;
            book.confirm(PeerId::random(), &address.clone().with(Protocol::Tcp(port)));
        }
        assert_eq!(book.of(&peer), std::slice::from_ref(address));
        assert_eq!(book.strangers.len(), STRANGERS_MAX);
        assert_eq!(book.order.len(), STRANGERS_MAX);
    }

    #[test]
    fn learned_addresses_are_bounded_and_the_latest_proven_comes_first() {
        let peer = PeerId::random();
        let mut book = AddressBook::default();
        for port in 1..=100u16 {
            book.confirm(peer, &format!("/ip4/10.0.0.1/tcp/{port}").parse().expect("a multiaddress"));
        }
        assert_eq!(book.of(&peer).len(), LEARNED_MAX);
        assert_eq!(book.of(&peer)[0], addresses(&["/ip4/10.0.0.1/tcp/100"])[0]);
    }
}
