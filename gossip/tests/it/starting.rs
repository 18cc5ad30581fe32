//! Listening, and its failures.

use coel_gossip::{Config, Identity, StartError};

use crate::bench::{QUIC, TCP, config, node};

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_refused_by_name() {
    for listen in [TCP, QUIC] {
        let first = node(listen).await;
        let address = first.listen_addresses()[0].clone();
        assert!(!address.to_string().contains("/0"), "port 0 is resolved: {address}");
        let second = coel_gossip::start(config(&Identity::generate(), &address.to_string())).await;
        let error = second.err().expect("the port is taken");
        assert!(matches!(error, StartError::PortInUse { .. }), "{error}");
        assert!(error.to_string().contains(&address.to_string()), "{error}");
        first.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_is_not_ours_or_not_spoken_is_named() {
    for address in ["/ip4/192.0.2.1/tcp/0", "/ip4/127.0.0.1/udp/0", "/unix/nowhere"] {
        let error = coel_gossip::start(config(&Identity::generate(), address)).await.err().expect("not listenable");
        assert!(error.to_string().contains(address), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_is_free_again_after_shutdown() {
    let first = node(TCP).await;
    let address = first.listen_addresses()[0].to_string();
    first.shutdown().await;
    let again = coel_gossip::start(config(&Identity::generate(), &address)).await.expect("the port is free");
    assert_eq!(again.listen_addresses()[0].to_string(), address);
}

#[tokio::test(flavor = "multi_thread")]
async fn by_default_a_node_listens_on_every_interface_and_names_them() {
    let defaults = Config { mdns: false, ..Config::new(Identity::generate()) };
    let node = coel_gossip::start(defaults).await.expect("starts");
    let addresses: Vec<String> = node.listen_addresses().iter().map(ToString::to_string).collect();
    for transport in ["/tcp/", "/udp/"] {
        assert!(addresses.iter().any(|address| address.contains(transport)), "{addresses:?}");
    }
    assert!(!addresses.iter().any(|address| address.contains("0.0.0.0")), "{addresses:?}");
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_multicast_a_node_starts_all_the_same() {
    let mut config = config(&Identity::generate(), TCP);
    config.mdns = true;
    coel_gossip::start(config).await.expect("mDNS is a convenience").shutdown().await;
}
