//! Processes inside a namespace and cgroup, driven by one-line commands: the test binary started again as its own test
//! `helper_process`. (A thread cannot do: a cgroup is a process's.)
use std::{
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, UdpSocket},
    os::{fd::AsRawFd, unix::process::CommandExt},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use socket2::{Domain, Socket, Type};

const VARIABLE: &str = "STRATA_TEST_HELPER";
const ANSWER: &str = "=> ";
/// Long enough for a loaded machine; tests never depend on how long something took.
const PATIENCE: Duration = Duration::from_secs(3);

/// A running helper; killed when dropped.
pub struct Helper {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Helper {
    pub fn start(netns: &File, cgroup: Option<&Path>) -> Helper {
        let netns = netns.as_raw_fd();
        let procs =
            cgroup.map(|folder| File::options().write(true).open(folder.join("cgroup.procs")).expect("a cgroup"));
        let procs_fd = procs.as_ref().map(AsRawFd::as_raw_fd);
        let mut command = Command::new(std::env::current_exe().expect("the test binary"));
        command
            .args(["--exact", "helper_process", "--nocapture", "--test-threads=1"])
            .env(VARIABLE, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        // SAFETY: only async-signal-safe system calls between fork and exec; the descriptors live until spawn returns.
        unsafe {
            command.pre_exec(move || {
                if let Some(procs) = procs_fd
                    && libc::write(procs, c"0".as_ptr().cast(), 1) != 1
                {
                    return Err(std::io::Error::last_os_error());
                }
                if libc::setns(netns, libc::CLONE_NEWNET) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let mut child = command.spawn().expect("start the helper");
        let stdin = child.stdin.take().expect("piped");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        Helper { child, stdin, stdout }
    }

    /// Sends a command and returns the answer.
    pub fn run(&mut self, command: &str) -> String {
        writeln!(self.stdin, "{command}").expect("the helper lives");
        loop {
            let mut line = String::new();
            let read = self.stdout.read_line(&mut line).expect("the helper lives");
            assert!(read > 0, "the helper died at {command:?}");
            if let Some((_, answer)) = line.split_once(ANSWER) {
                return answer.trim_end().to_owned();
            }
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The body of the test `helper_process`: nothing unless started by [`Helper::start`].
pub fn main() {
    if std::env::var_os(VARIABLE).is_none() {
        return;
    }
    let mut held: Option<Socket> = None;
    for line in std::io::stdin().lines() {
        let line = line.expect("a line");
        let words: Vec<&str> = line.split(' ').collect();
        let answer = match words.as_slice() {
            ["serve", "tcp", address] => serve_tcp(address),
            ["serve", "udp", address] => serve_udp(address),
            ["tcp", address] => tcp(address, None).map(|(_, said)| said),
            ["tcp", address, "device", device] => tcp(address, Some(device)).map(|(_, said)| said),
            ["hold", address] => tcp(address, None).map(|(socket, said)| {
                held = Some(socket);
                said
            }),
            ["say"] => say(held.as_ref().expect("a held connection")),
            ["udp", "sendto", address] => udp_sendto(address),
            ["udp", "connect", address] => udp_connect(address),
            _ => panic!("unknown command {line:?}"),
        };
        let answer = answer.unwrap_or_else(|error| match error.raw_os_error() {
            Some(errno) => format!("{:?}", nix::errno::Errno::from_raw(errno)),
            None => format!("{:?}", error.kind()),
        });
        println!("{ANSWER}{answer}");
    }
}

fn parse(address: &str) -> SocketAddr {
    address.parse().unwrap_or_else(|_| panic!("{address:?} is no address"))
}

fn name(address: socket2::SockAddr) -> String {
    address.as_socket().map_or("none".into(), |address| address.to_string())
}

/// Serves each connection: says who it sees as peer and as itself, then echoes.
pub fn serve(listener: Socket, label: &'static str) {
    std::thread::spawn(move || {
        while let Ok((socket, peer)) = listener.accept() {
            std::thread::spawn(move || {
                let mut socket = socket;
                let (peer, local) = (name(peer), name(socket.local_addr().expect("local")));
                let asked = name(socket.peer_addr().expect("peer"));
                let _ = writeln!(socket, "{label} peer={peer} getpeername={asked} local={local}");
                let mut buffer = [0; 512];
                while let Ok(length @ 1..) = socket.read(&mut buffer) {
                    if socket.write_all(&buffer[..length]).is_err() {
                        return;
                    }
                }
            });
        }
    });
}

fn serve_tcp(address: &str) -> std::io::Result<String> {
    let address = parse(address);
    let listener = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    listener.set_reuse_address(true)?;
    listener.bind(&address.into())?;
    listener.listen(64)?;
    serve(listener, "app");
    Ok("serving".into())
}

fn serve_udp(address: &str) -> std::io::Result<String> {
    let socket = UdpSocket::bind(parse(address))?;
    std::thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    });
    Ok("serving".into())
}

fn tcp(address: &str, device: Option<&str>) -> std::io::Result<(Socket, String)> {
    let address = parse(address);
    let mut socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    if let Some(device) = device {
        socket.bind_device(Some(device.as_bytes()))?;
    }
    socket.connect_timeout(&address.into(), PATIENCE)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let peer = name(socket.peer_addr()?);
    let mut line = Vec::new();
    let mut byte = [0];
    while socket.read(&mut byte)? == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    let said = String::from_utf8_lossy(&line).into_owned();
    Ok((socket, format!("connected={peer} {said}")))
}

/// One round trip on the held connection.
fn say(socket: &Socket) -> std::io::Result<String> {
    let mut socket = socket;
    socket.write_all(b"hello")?;
    let mut buffer = [0; 5];
    socket.read_exact(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer).into_owned())
}

fn any(address: SocketAddr) -> SocketAddr {
    if address.is_ipv4() { parse("0.0.0.0:0") } else { parse("[::]:0") }
}

fn udp_sendto(address: &str) -> std::io::Result<String> {
    let address = parse(address);
    let socket = UdpSocket::bind(any(address))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send_to(b"hello", address)?;
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer)?;
    Ok(format!("from={from} said={}", String::from_utf8_lossy(&buffer[..length])))
}

fn udp_connect(address: &str) -> std::io::Result<String> {
    let address = parse(address);
    let socket = UdpSocket::bind(any(address))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(address)?;
    let peer = socket.peer_addr()?;
    socket.send(b"hello")?;
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer)?;
    Ok(format!("connected={peer} from={from} said={}", String::from_utf8_lossy(&buffer[..length])))
}
