//! The process that is written to, and its handle in the process that writes.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver as Lines, channel};
use std::time::Duration;

use pd_backend::buffer::{HostHandle, HostMapping, HostMemory, Memory};
use pd_backend::transfer::{EngineKind, Export};

use super::{ENVIRONMENT, engine, hex, kind_named};

const ENGINE_VARIABLE: &str = "PD_TEST_RECEIVER_ENGINE";
const LENGTHS_VARIABLE: &str = "PD_TEST_RECEIVER_LENGTHS";
const MARK: &str = "pd-receiver-says:";
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// Runs the receiver if this process was started as one, and says whether it was. Ends when stdin does.
pub fn serve_if_asked() -> bool {
    let Ok(name) = std::env::var(ENGINE_VARIABLE) else {
        return false;
    };
    let lengths = std::env::var(LENGTHS_VARIABLE).expect("both variables are set together");
    let (len_bytes, unit_bytes) = lengths.split_once(' ').expect("two numbers");
    let memory = HostMemory::allocate(len_bytes.parse().expect("a number")).expect("the test's buffer fits");
    let handle = memory.handle();
    let mut engine = engine(kind_named(&name), "receiver");
    engine.register(Arc::new(Memory::Host(memory)), unit_bytes.parse().expect("a number")).expect("it registers");
    let export = engine.export().expect("it exports");
    println!(
        "\n{MARK} {} {} {} {} {} {} {}",
        export.agent_name,
        hex::encode(&export.metadata),
        hex::encode(&export.descriptors),
        handle.pid,
        handle.fd,
        handle.len_bytes,
        handle.inode
    );
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("the sender writes text");
        let (agent_name, metadata) = line.split_once(' ').expect("a name and metadata");
        match engine.load_peer(agent_name, &hex::decode(metadata)) {
            Ok(_) => println!("\n{MARK} ok"),
            Err(error) => println!("\n{MARK} refused: {error}"),
        }
    }
    true
}

/// A running receiver; killed when dropped.
pub struct Receiver {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Lines<String>,
    /// What it exported.
    pub export: Export,
    /// Its memory, mapped here.
    pub mapping: HostMapping,
    /// How it was mapped.
    pub handle: HostHandle,
}

impl Receiver {
    /// Starts this executable again with `arguments`, which must lead to [`serve_if_asked`].
    pub fn start(arguments: &[&str], kind: EngineKind, len_bytes: u64, unit_bytes: u64) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this executable has a path"))
            .args(arguments)
            .envs(ENVIRONMENT)
            .env(ENGINE_VARIABLE, kind.as_str())
            .env(LENGTHS_VARIABLE, format!("{len_bytes} {unit_bytes}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this executable starts again");
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().expect("stdout is piped");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Some((_, said)) = line.split_once(MARK)
                    && sender.send(said.trim().to_owned()).is_err()
                {
                    return;
                }
            }
        });
        let hello = lines.recv_timeout(ANSWER_MAX).expect("the receiver says hello");
        let words: Vec<&str> = hello.split(' ').collect();
        let number = |at: usize| words[at].parse::<u64>().expect("a number");
        let export = Export {
            agent_name: words[0].to_owned(),
            metadata: hex::decode(words[1]),
            descriptors: hex::decode(words[2]),
        };
        let handle = HostHandle { pid: number(3) as u32, fd: number(4) as i32, len_bytes: number(5), inode: number(6) };
        let mapping = HostMapping::open(&handle).expect("the receiver's memory can be mapped");
        Self { child, stdin, lines, export, mapping, handle }
    }

    /// Introduces the sender to it.
    pub fn load_peer(&mut self, export: &Export) {
        let stdin = self.stdin.as_mut().expect("stdin is piped");
        writeln!(stdin, "{} {}", export.agent_name, hex::encode(&export.metadata)).expect("the receiver listens");
        let answer = self.lines.recv_timeout(ANSWER_MAX).expect("the receiver answers");
        assert_eq!(answer, "ok");
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) {
        self.child.kill().expect("it is ours to kill");
        self.child.wait().expect("it is ours to wait for");
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
