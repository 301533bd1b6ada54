//! istio-cni's part, played on a real socket: its protocol, and its rules in the pods.
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use prost::Message;
use strata_handoff::{Listener, SeqPacket};
use xds_proto::istio::zds::workload_request::Payload;
use xds_proto::istio::zds::{self, WorkloadRequest, WorkloadResponse, ZdsHello, workload_response};

use crate::world::{Control, Pod, Process, node_command, run};

/// What istio-cni's rules do in a pod, in nft's words (cni/pkg/iptables of istio/istio has them in iptables').
const RULES: &str = "
table inet ambient {
  chain raw_in {
    type filter hook prerouting priority raw;
    udp sport 53 mark & 0xfff != 0x539 ct zone set 1
  }
  chain raw_out {
    type filter hook output priority raw;
    udp dport 53 mark & 0xfff == 0x539 ct zone set 1
  }
  chain mark_in {
    type filter hook prerouting priority mangle;
    mark & 0xfff == 0x539 ct mark set ct mark & 0xfffff000 | 0x111
  }
  chain mark_out {
    type route hook output priority mangle;
    ct mark & 0xfff == 0x111 mark set ct mark
  }
  chain in {
    type nat hook prerouting priority dstnat;
    ip saddr 169.254.7.127 meta l4proto tcp accept
    ip daddr 127.0.0.1 return
    ip6 daddr ::1 return
    tcp dport != 15008 mark & 0xfff != 0x539 redirect to :15006
  }
  chain out {
    type nat hook output priority -100;
    ip daddr 169.254.7.127 meta l4proto tcp accept
    oifname != \"lo\" udp dport 53 mark & 0xfff != 0x539 redirect to :15053
    ip daddr 127.0.0.1 return
    ip6 daddr ::1 return
    tcp dport 53 mark & 0xfff != 0x539 redirect to :15053
    meta l4proto tcp mark & 0xfff == 0x111 accept
    oifname \"lo\" accept
    meta l4proto tcp mark & 0xfff != 0x539 redirect to :15001
  }
}";

/// Captures a pod as istio-cni does.
pub fn capture(pod: &Pod) {
    let name = &pod.name;
    for family in ["-4", "-6"] {
        run(&format!(
            "ip {family} -n {name} rule add fwmark 0x111/0xfff pref 32764 lookup 100;
             ip {family} -n {name} route add local default dev lo table 100"
        ));
    }
    nft(pod, RULES);
}

/// Takes the rules out of a pod that stays.
pub fn release(pod: &Pod) {
    let name = &pod.name;
    nft(pod, "delete table inet ambient");
    for family in ["-4", "-6"] {
        run(&format!("ip {family} -n {name} rule del pref 32764; ip {family} -n {name} route flush table 100"));
    }
}

fn nft(pod: &Pod, text: &str) {
    let mut child = Command::new("ip")
        .args(["netns", "exec", &pod.name, "nft", "-f", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("ip; nft is of the Debian package nftables");
    std::io::Write::write_all(child.stdin.as_mut().unwrap(), text.as_bytes()).unwrap();
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success(), "nft in {}", pod.name);
}

/// istio-cni's listening socket.
pub struct Cni {
    path: PathBuf,
    listener: Option<Listener>,
}

impl Cni {
    pub fn start(folder: &Path) -> Cni {
        let path = folder.join("ztunnel.sock");
        Cni { listener: Some(Listener::bind(&path).unwrap()), path }
    }

    pub fn stop(&mut self) {
        self.listener = None;
    }

    pub fn start_again(&mut self) {
        self.listener = Some(Listener::bind(&self.path).unwrap());
    }

    /// The proxy that connects next and introduces itself.
    pub async fn accept(&self) -> Connection {
        let accept = self.listener.as_ref().unwrap().accept_any();
        let socket = tokio::time::timeout(Duration::from_secs(10), accept).await.expect("the proxy connects").unwrap();
        let (hello, descriptors) = socket.recv().await.unwrap();
        assert_eq!(ZdsHello::decode(&*hello).unwrap().version(), zds::Version::V1);
        assert!(descriptors.is_empty());
        Connection(socket)
    }
}

/// One proxy's connection. Each message returns the error it is answered with, empty for none.
pub struct Connection(SeqPacket);

impl Connection {
    /// A pod of namespace `shop` with the account `name`, in the namespace behind `netns`.
    pub async fn add(&self, uid: &str, name: &str, netns: &File) -> String {
        let (namespace, service_account) = ("shop".to_owned(), name.to_owned());
        let info = zds::WorkloadInfo { name: name.to_owned(), namespace, service_account };
        let add = zds::AddWorkload { uid: uid.to_owned(), workload_info: Some(info) };
        self.ask(Payload::Add(add), &[netns.as_fd()]).await
    }

    pub async fn keep(&self, uid: &str) -> String {
        self.ask(Payload::Keep(zds::KeepWorkload { uid: uid.to_owned() }), &[]).await
    }

    pub async fn del(&self, uid: &str) -> String {
        self.ask(Payload::Del(zds::DelWorkload { uid: uid.to_owned() }), &[]).await
    }

    pub async fn snapshot_sent(&self) -> String {
        self.ask(Payload::SnapshotSent(zds::SnapshotSent {}), &[]).await
    }

    pub async fn ask(&self, payload: Payload, descriptors: &[BorrowedFd<'_>]) -> String {
        self.say(&WorkloadRequest { payload: Some(payload) }.encode_to_vec(), descriptors).await
    }

    /// istio-cni waits for 5 s, with 1024 bytes of room.
    pub async fn say(&self, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> String {
        self.0.send(message, descriptors).await.unwrap();
        let answer = tokio::time::timeout(Duration::from_secs(5), self.0.recv()).await.expect("an answer").unwrap().0;
        assert!(answer.len() <= 1024);
        match WorkloadResponse::decode(&*answer).unwrap().payload {
            Some(workload_response::Payload::Ack(ack)) => ack.error,
            None => panic!("an answer without an ack"),
        }
    }

    /// Whether the proxy ends the connection now.
    pub async fn is_closed(&self) -> bool {
        let ended = tokio::time::timeout(Duration::from_secs(5), self.0.recv()).await;
        matches!(ended, Ok(Err(strata_handoff::HandoffError::Closed)))
    }
}

/// The binary beside istio-cni.
pub struct Proxy {
    pub child: Process,
    run_dir: tempfile::TempDir,
}

impl Proxy {
    /// Starts it; it is not ready before istio-cni has named all pods. `resolver` is its cluster's.
    pub fn start(control: &Control, cni: &Cni, resolver: Option<&Pod>) -> Proxy {
        Proxy::start_at(control, &cni.path, resolver)
    }

    /// As `start`, for whoever will listen on `socket`.
    pub fn start_at(control: &Control, socket: &Path, resolver: Option<&Pod>) -> Proxy {
        let run_dir = tempfile::tempdir().unwrap();
        let mut command = node_command(control, run_dir.path());
        command.arg(format!("--pods-from=zds:{}", socket.display())).args(["--drain-seconds", "2"]);
        if let Some(resolver) = resolver {
            let file = run_dir.path().join("resolv.conf");
            std::fs::write(&file, format!("nameserver {}\n", resolver.ip)).unwrap();
            let mut own = Command::new("unshare");
            own.args(["-m", "sh", "-ec", "mount --bind \"$0\" /etc/resolv.conf; exec \"$@\""]).arg(file);
            own.arg(command.get_program()).args(command.get_args());
            command = own;
        }
        Proxy { child: Process(command.spawn().unwrap()), run_dir }
    }

    pub fn socket(&self) -> PathBuf {
        self.run_dir.path().join("proxy.sock")
    }

    pub async fn metrics(&self) -> String {
        strata_runtime::client::get_text(&self.socket(), "/metrics").await.unwrap()
    }
}
