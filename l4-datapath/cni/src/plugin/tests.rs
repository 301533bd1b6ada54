//! Against an agent's socket that answers as told.
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::mpsc;

use super::*;
use crate::protocol::{Added, Address, AttachmentId, Device, PodName};

const ENVIRONMENT: [(&str, &str); 5] = [
    ("CNI_COMMAND", "ADD"),
    ("CNI_CONTAINERID", "abc123"),
    ("CNI_NETNS", "/run/netns/pod"),
    ("CNI_IFNAME", "eth0"),
    ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=checkout-1;K8S_POD_UID=u-1"),
];

fn call(changes: &[(&str, &str)], input: &str) -> Outcome {
    let environment = |variable: &str| {
        let of = |pairs: &[(&str, &str)]| {
            pairs.iter().find(|(key, _)| *key == variable).map(|(_, value)| (*value).to_owned())
        };
        of(changes).or_else(|| of(&ENVIRONMENT))
    };
    run(&environment, input)
}

/// Answers one call; the request comes out of the channel.
fn agent(socket: &Path, response: Response) -> mpsc::Receiver<Request> {
    let listener = UnixListener::bind(socket).unwrap();
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        sender.send(serde_json::from_str(&line).unwrap()).unwrap();
        stream.write_all(serde_json::to_string(&response).unwrap().as_bytes()).unwrap();
        stream.write_all(b"\n").unwrap();
    });
    receiver
}

fn config(version: &str, socket: &Path, more: &str) -> String {
    let socket = socket.display();
    format!(r#"{{"cniVersion":"{version}","name":"strata","type":"strata-cni","agentSocket":"{socket}"{more}}}"#)
}

fn made() -> Response {
    let device = |name: &str, mac: &str| Device { name: name.into(), mac: mac.into(), mtu: 1450 };
    let address =
        |address: &str, gateway: &str| Address { address: address.parse().unwrap(), gateway: gateway.parse().unwrap() };
    Response::Added(Added {
        host: device("st0001", "02:00:00:00:00:01"),
        pod: device("eth0", "02:00:00:00:00:02"),
        addresses: vec![address("10.1.0.5/32", "169.254.1.1"), address("fd01::5/128", "fe80::1")],
    })
}

fn failure(outcome: &Outcome) -> (u64, String) {
    assert!(!outcome.success);
    let out = outcome.stdout.as_ref().unwrap();
    (out["code"].as_u64().unwrap(), format!("{}: {}", out["msg"].as_str().unwrap(), out["details"]))
}

#[test]
fn add_asks_the_agent_and_answers_in_the_version_of_the_configuration() {
    let results = [
        (
            "0.4.0",
            r#"{"cniVersion":"0.4.0","interfaces":[{"name":"st0001","mac":"02:00:00:00:00:01"},{"name":"eth0","mac":"02:00:00:00:00:02","sandbox":"/run/netns/pod"}],"ips":[{"version":"4","address":"10.1.0.5/32","gateway":"169.254.1.1","interface":1},{"version":"6","address":"fd01::5/128","gateway":"fe80::1","interface":1}],"routes":[{"dst":"0.0.0.0/0","gw":"169.254.1.1"},{"dst":"::/0","gw":"fe80::1"}],"dns":{}}"#,
        ),
        (
            "1.0.0",
            r#"{"cniVersion":"1.0.0","interfaces":[{"name":"st0001","mac":"02:00:00:00:00:01"},{"name":"eth0","mac":"02:00:00:00:00:02","sandbox":"/run/netns/pod"}],"ips":[{"address":"10.1.0.5/32","gateway":"169.254.1.1","interface":1},{"address":"fd01::5/128","gateway":"fe80::1","interface":1}],"routes":[{"dst":"0.0.0.0/0","gw":"169.254.1.1"},{"dst":"::/0","gw":"fe80::1"}],"dns":{}}"#,
        ),
        (
            "1.1.0",
            r#"{"cniVersion":"1.1.0","interfaces":[{"name":"st0001","mac":"02:00:00:00:00:01","mtu":1450},{"name":"eth0","mac":"02:00:00:00:00:02","mtu":1450,"sandbox":"/run/netns/pod"}],"ips":[{"address":"10.1.0.5/32","gateway":"169.254.1.1","interface":1},{"address":"fd01::5/128","gateway":"fe80::1","interface":1}],"routes":[{"dst":"0.0.0.0/0","gw":"169.254.1.1"},{"dst":"::/0","gw":"fe80::1"}],"dns":{}}"#,
        ),
    ];
    for (version, golden) in results {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("cni.sock");
        let asked = agent(&socket, made());
        let outcome = call(&[], &config(version, &socket, ""));
        assert!(outcome.success);
        assert_eq!(outcome.stdout.unwrap().to_string(), golden);
        let expected = Add {
            attachment: AttachmentId { container_id: "abc123".into(), ifname: "eth0".into() },
            netns: "/run/netns/pod".into(),
            pod: PodName { namespace: "shop".into(), name: "checkout-1".into(), uid: "u-1".into() },
            chained: None,
        };
        assert_eq!(asked.recv().unwrap(), Request::Add(expected));
    }
}

#[test]
fn a_chained_call_returns_the_previous_result_without_loss() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("cni.sock");
    let asked = agent(&socket, made());
    let previous = r#"{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"/x","unknown":[1]}],"ips":[{"address":"10.9.0.2/24","interface":0}],"dns":{"nameservers":["10.0.0.10"]},"vendor":{"b":1,"a":2}}"#;
    let outcome = call(&[], &config("1.0.0", &socket, &format!(r#","prevResult":{previous}"#)));
    assert_eq!(outcome.stdout.unwrap().to_string(), previous);
    let Request::Add(add) = asked.recv().unwrap() else { panic!("not an ADD") };
    assert_eq!(add.chained, Some(vec!["10.9.0.2".parse().unwrap()]));
}

#[test]
fn check_gc_del_and_status_print_nothing() {
    let previous = r#","prevResult":{"ips":[{"address":"10.1.0.5/32"}]}"#;
    let valid = r#","cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]"#;
    for (command, more) in [("CHECK", previous), ("GC", valid), ("DEL", ""), ("STATUS", "")] {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("cni.sock");
        let asked = agent(&socket, Response::Done);
        let outcome = call(&[("CNI_COMMAND", command)], &config("1.1.0", &socket, more));
        assert_eq!(outcome, Outcome { stdout: None, success: true }, "{command}");
        match (command, asked.recv().unwrap()) {
            ("CHECK", Request::Check(check)) => {
                assert_eq!(check.addresses, ["10.1.0.5".parse::<std::net::IpAddr>().unwrap()])
            }
            ("GC", Request::Gc { valid }) => assert_eq!(valid[0].to_string(), "a/eth0"),
            ("DEL", Request::Del { attachment }) => assert_eq!(attachment.to_string(), "abc123/eth0"),
            ("STATUS", Request::Status) => {}
            (command, other) => panic!("{command} became {other:?}"),
        }
    }
}

#[test]
fn version_needs_no_agent() {
    let outcome = call(&[("CNI_COMMAND", "VERSION")], r#"{"cniVersion":"1.0.0"}"#);
    let golden = r#"{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.0.0","1.1.0"]}"#;
    assert_eq!(outcome.stdout.unwrap().to_string(), golden);
}

#[test]
fn bad_input_names_the_field() {
    let good = config("1.1.0", Path::new("/nowhere/cni.sock"), "");
    type Case<'a> = (&'a [(&'a str, &'a str)], &'a str, u64, &'a str);
    let cases: [Case<'_>; 14] = [
        (&[("CNI_COMMAND", "")], &good, 4, "CNI_COMMAND"),
        (&[("CNI_COMMAND", "UPDATE")], &good, 4, "UPDATE"),
        (&[("CNI_CONTAINERID", "../x")], &good, 4, "CNI_CONTAINERID"),
        (&[("CNI_NETNS", "")], &good, 4, "CNI_NETNS"),
        (&[("CNI_NETNS", "pod")], &good, 4, "absolute"),
        (&[("CNI_IFNAME", "a/b")], &good, 4, "CNI_IFNAME"),
        (&[("CNI_IFNAME", "abcdefghijklmnop")], &good, 4, "CNI_IFNAME"),
        (&[("CNI_ARGS", "K8S_POD_NAME")], &good, 4, "KEY=VALUE"),
        (&[("CNI_ARGS", "K8S_POD_NAME=a")], &good, 4, "K8S_POD_NAMESPACE"),
        (&[], "{", 6, "JSON"),
        (&[], r#"{"name":"n"}"#, 1, "0.1.0"),
        (&[], r#"{"cniVersion":"2.0.0","name":"n"}"#, 1, "2.0.0"),
        (&[], r#"{"cniVersion":"1.0.0"}"#, 7, "name"),
        (&[("CNI_COMMAND", "GC")], r#"{"cniVersion":"1.0.0","name":"n"}"#, 1, "no GC"),
    ];
    for (changes, input, code, text) in cases {
        let (found, message) = failure(&call(changes, input));
        assert_eq!(found, code, "{message}");
        assert!(message.contains(text), "{message:?} does not mention {text:?}");
    }
    let previous = [("", "prevResult"), (r#","prevResult":{"ips":[{"address":"x"}]}"#, "ips[0]")];
    for (more, text) in previous {
        let input = config("1.1.0", Path::new("/nowhere"), more);
        let (found, message) = failure(&call(&[("CNI_COMMAND", "CHECK")], &input));
        assert!(found == 7 && message.contains(text), "{message}");
    }
    let (found, message) = failure(&call(&[("CNI_COMMAND", "GC")], &good));
    assert!(found == 7 && message.contains("valid-attachments"), "{message}");
}

#[test]
fn without_the_agent_the_runtime_is_told_to_try_again() {
    let folder = tempfile::tempdir().unwrap();
    let input = config("1.1.0", &folder.path().join("cni.sock"), "");
    assert_eq!(failure(&call(&[], &input)).0, 11);
    assert_eq!(failure(&call(&[("CNI_COMMAND", "DEL")], &input)).0, 11);
    assert_eq!(failure(&call(&[("CNI_COMMAND", "STATUS")], &input)).0, 50);
}

#[test]
fn the_agents_refusal_is_passed_on() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("cni.sock");
    let refusal = Failure::new(code::NO_ADDRESS, "no free address").because("10.1.0.0/24 is full");
    let _asked = agent(&socket, Response::Failed(refusal));
    let outcome = call(&[], &config("1.0.0", &socket, ""));
    let golden = r#"{"cniVersion":"1.0.0","code":102,"msg":"no free address","details":"10.1.0.0/24 is full"}"#;
    assert_eq!(outcome.stdout.unwrap().to_string(), golden);
}
