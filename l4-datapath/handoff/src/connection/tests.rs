use std::io::{Read, Write};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use super::*;
use crate::message::{PodInfo, ShortCut, VERSION};

fn pod() -> PodInfo {
    PodInfo {
        uid: "Kubernetes//Pod/shop/checkout".into(),
        namespace: "shop".into(),
        name: "checkout".into(),
        service_account: "checkout".into(),
        node: "node-a".into(),
        ips: vec!["10.8.0.11".parse::<IpAddr>().unwrap(), "fd00:8::b".parse().unwrap()],
        pod_index: 7,
    }
}

async fn pair(folder: &tempfile::TempDir) -> (AgentEnd, ProxyEnd) {
    let path = folder.path().join("handoff.sock");
    let listener = Listener::bind(&path).unwrap();
    let proxy = ProxyEnd::connect(&path).unwrap();
    (listener.accept().await.unwrap(), proxy)
}

#[tokio::test]
async fn messages_carry_working_descriptors() {
    let folder = tempfile::tempdir().unwrap();
    let (agent, proxy) = pair(&folder).await;
    proxy.send(&ProxyMessage::Hello { version: VERSION, pid: 1, resolvers: vec![] }, &[]).await.unwrap();
    assert_eq!(agent.recv().await.unwrap().0, ProxyMessage::Hello { version: VERSION, pid: 1, resolvers: vec![] });

    let (mut ours, theirs) = UnixStream::pair().unwrap();
    agent.send(&AgentMessage::PodAdded { pod: pod() }, &[theirs.as_fd()]).await.unwrap();
    drop(theirs);
    let (message, mut descriptors) = proxy.recv().await.unwrap();
    assert_eq!(message, AgentMessage::PodAdded { pod: pod() });
    assert_eq!(descriptors.len(), 1);
    UnixStream::from(descriptors.remove(0)).write_all(b"through").unwrap();
    let mut text = String::new();
    ours.read_to_string(&mut text).unwrap();
    assert_eq!(text, "through");
}

#[tokio::test]
async fn a_message_nobody_understands_does_not_end_the_connection() {
    let folder = tempfile::tempdir().unwrap();
    let (agent, proxy) = pair(&folder).await;
    // An agent of the future, as far as this proxy is concerned.
    let future: Connection<serde_json::Value, ProxyMessage> = Connection::over(agent.socket);
    future.send(&serde_json::json!({"type": "from_the_future"}), &[]).await.unwrap();
    let error = proxy.recv().await.unwrap_err();
    assert!(error.is_recoverable() && error.to_string().contains("from_the_future"), "{error}");
    future.send(&serde_json::json!({"type": "snapshot_sent", "extra": 1}), &[]).await.unwrap();
    assert_eq!(proxy.recv().await.unwrap().0, AgentMessage::SnapshotSent);
}

#[tokio::test]
async fn the_end_is_told_apart_from_errors() {
    let folder = tempfile::tempdir().unwrap();
    let (agent, proxy) = pair(&folder).await;
    drop(proxy);
    assert!(matches!(agent.recv().await, Err(HandoffError::Closed)));
    let grant = ShortCut { src: [10, 8, 0, 1].into(), dst: [10, 8, 0, 2].into(), port: 80 };
    let (agent, proxy) = pair(&folder).await;
    drop(agent);
    assert!(matches!(proxy.send(&ProxyMessage::Grant(grant), &[]).await, Err(HandoffError::Closed)));
}

/// What the agent relies on to know where a proxy lives; needs root.
#[tokio::test]
async fn the_kernel_tells_the_proxys_process_and_namespace() {
    let cookie = |fd: std::os::fd::BorrowedFd<'_>| {
        let (mut cookie, mut length) = (0u64, size_of::<u64>() as nix::libc::socklen_t);
        // SAFETY: both live through the call and have the sizes said.
        let result = unsafe {
            nix::libc::getsockopt(
                fd.as_raw_fd(),
                nix::libc::SOL_SOCKET,
                nix::libc::SO_NETNS_COOKIE,
                std::ptr::from_mut(&mut cookie).cast(),
                &mut length,
            )
        };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        cookie
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("handoff.sock");
    let listener = Listener::bind(&path).unwrap();
    let (there, connected) = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a namespace of its own (root)");
        let probe = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        (cookie(probe.as_fd()), UnixSeqpacket::connect(&path))
    })
    .join()
    .unwrap();
    let accepted = listener.accept().await.unwrap();
    assert_eq!(accepted.peer_pid().unwrap(), Some(std::process::id()));
    assert_eq!(cookie(accepted.socket()), there, "the accepted socket is of the proxy's namespace");
    let own = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    assert_ne!(cookie(own.as_fd()), there);
    drop(connected);
}

struct UnixSeqpacket;

impl UnixSeqpacket {
    /// A plain socket: the connecting thread has no runtime.
    fn connect(path: &Path) -> OwnedFd {
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::empty(), None).unwrap();
        connect(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
        fd
    }
}
