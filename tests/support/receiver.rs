//! The process that is written to, and its handle in the process that writes.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver as Lines, channel};
use std::time::Duration;

use pd_backend::buffer::Memory;
use pd_backend::transfer::{ByteCopy, EngineKind, Export};

use super::memory::{Handle, Mapping, MemoryKind, describe};
use super::sender::Sender;
use super::{ENVIRONMENT, engine, hex, kind_named};

/// `gpu` for a receiver whose buffer is on a GPU.
pub const MEMORY_VARIABLE: &str = "PD_TEST_RECEIVER_MEMORY";

const ENGINE_VARIABLE: &str = "PD_TEST_RECEIVER_ENGINE";
const LENGTHS_VARIABLE: &str = "PD_TEST_RECEIVER_LENGTHS";
const MARK: &str = "pd-receiver-says:";
const ANSWER_MAX: Duration = Duration::from_secs(240);

/// Runs the receiver if this process was started as one, and says whether it was. Ends when stdin does.
pub fn serve_if_asked() -> bool {
    let Ok(name) = std::env::var(ENGINE_VARIABLE) else {
        return false;
    };
    let lengths = std::env::var(LENGTHS_VARIABLE).expect("both variables are set together");
    let lengths: Vec<u64> = lengths.split(' ').map(|length| length.parse().expect("a number")).collect();
    let [ceiling_bytes, mut len_bytes, unit_bytes] = lengths[..] else { panic!("three numbers") };
    let memory = MemoryKind::of_variable(MEMORY_VARIABLE).allocate(ceiling_bytes, len_bytes);
    let mut engine = engine(kind_named(&name), "receiver");
    engine.register(memory.clone(), unit_bytes, len_bytes).expect("it registers");
    let export = engine.export().expect("it exports");
    say(&format!(
        "{} {} {} {}",
        export.agent_name,
        hex::encode(&export.metadata),
        hex::encode(&export.descriptors),
        describe(&memory)
    ));
    let mut node = Sender::of(engine, Arc::clone(&memory));
    let (mut incoming, mut outgoing) = (None, None);
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("the sender writes text");
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["grow", end] => {
                let step = len_bytes..end.parse().expect("a number");
                let Memory::Host(host) = &*memory else { panic!("only host memory grows") };
                host.populate(step.clone()).expect("the step fits");
                len_bytes = step.end;
                let Export { metadata, descriptors, .. } = node.engine.extend(step).expect("it extends");
                say(&format!("{} {}", hex::encode(&metadata), hex::encode(&descriptors)));
            }
            ["connect", agent_name, metadata, descriptors] => {
                let (metadata, descriptors) = (hex::decode(metadata), hex::decode(descriptors));
                outgoing = Some(node.connect_to(&Export { agent_name: agent_name.to_owned(), metadata, descriptors }));
                say("ok");
            }
            ["write", copies] => {
                let copies: Vec<ByteCopy> = serde_json::from_str::<Vec<[u64; 3]>>(copies)
                    .expect("a list of copies")
                    .into_iter()
                    .map(|[local_offset, remote_offset, len_bytes]| ByteCopy { local_offset, remote_offset, len_bytes })
                    .collect();
                node.ship(outgoing.expect("it has connected"), &copies).expect("it writes");
                say("ok");
            }
            [agent_name, metadata] => {
                // As after any handshake: a peer that was connected is lost first.
                if let Some(connection) = incoming.take() {
                    node.engine.disconnect(connection);
                }
                match node.engine.load_peer(agent_name, &hex::decode(metadata)) {
                    Ok(connection) => incoming = Some(connection),
                    Err(error) => panic!("refused: {error}"),
                }
                say("ok");
            }
            _ => panic!("{line}"),
        }
    }
    true
}

fn say(text: &str) {
    println!("\n{MARK} {text}");
}

/// A running receiver; killed when dropped.
pub struct Receiver {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Lines<String>,
    /// What it exported.
    pub export: Export,
    /// Its memory, mapped here.
    pub mapping: Mapping,
    /// How it was mapped.
    pub handle: Handle,
}

impl Receiver {
    /// Starts this executable again with `arguments`, which must lead to [`serve_if_asked`].
    pub fn start(arguments: &[&str], kind: EngineKind, len_bytes: u64, unit_bytes: u64) -> Self {
        Self::start_lazy(arguments, kind, len_bytes, len_bytes, unit_bytes)
    }

    /// The same with a buffer that may grow.
    pub fn start_lazy(
        arguments: &[&str],
        kind: EngineKind,
        ceiling_bytes: u64,
        len_bytes: u64,
        unit_bytes: u64,
    ) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this executable has a path"))
            .args(arguments)
            .envs(ENVIRONMENT)
            .env(ENGINE_VARIABLE, kind.as_str())
            .env(LENGTHS_VARIABLE, format!("{ceiling_bytes} {len_bytes} {unit_bytes}"))
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
        let export = Export {
            agent_name: words[0].to_owned(),
            metadata: hex::decode(words[1]),
            descriptors: hex::decode(words[2]),
        };
        let handle: Handle = serde_json::from_str(words[3]).expect("a handle");
        let mapping = Mapping::open(&handle).expect("the receiver's memory can be mapped");
        Self { child, stdin, lines, export, mapping, handle }
    }

    /// Introduces the sender to it.
    pub fn load_peer(&mut self, export: &Export) {
        self.ask(&format!("{} {}", export.agent_name, hex::encode(&export.metadata)));
        self.finish();
    }

    /// It begins to connect to the sender, to write to it as well. [`finish`](Self::finish) waits for the end.
    pub fn start_connecting(&mut self, export: &Export) {
        let Export { agent_name, metadata, descriptors } = export;
        self.ask(&format!("connect {agent_name} {} {}", hex::encode(metadata), hex::encode(descriptors)));
    }

    /// It begins to write. [`finish`](Self::finish) waits for the end.
    pub fn start_writing(&mut self, copies: &[ByteCopy]) {
        let copies: Vec<[u64; 3]> =
            copies.iter().map(|copy| [copy.local_offset, copy.remote_offset, copy.len_bytes]).collect();
        self.ask(&format!("write {}", serde_json::to_string(&copies).expect("numbers")));
    }

    /// Waits until it has done what was begun.
    pub fn finish(&self) {
        assert_eq!(self.answer(), "ok");
    }

    /// Its buffer grows up to `end`; `export` is what it says from then on.
    pub fn grow(&mut self, end: u64) {
        self.ask(&format!("grow {end}"));
        let answer = self.answer();
        let (metadata, descriptors) = answer.split_once(' ').expect("two words");
        self.export.metadata = hex::decode(metadata);
        self.export.descriptors = hex::decode(descriptors);
    }

    fn ask(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().expect("stdin is piped");
        writeln!(stdin, "{line}").expect("the receiver listens");
    }

    fn answer(&self) -> String {
        self.lines.recv_timeout(ANSWER_MAX).expect("the receiver answers")
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGSTOP: it is there, and does nothing. Waits until its last thread has stopped.
    pub fn stop(&self) {
        self.signal(rustix::process::Signal::STOP);
        let is_stopped = |task: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            // The state is the word behind the name, which is in parentheses.
            stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
        };
        let tasks = || std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("it lives");
        while !tasks().all(|task| task.is_ok_and(is_stopped)) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// SIGCONT.
    pub fn go_on(&self) {
        self.signal(rustix::process::Signal::CONT);
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("it is ours to signal");
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
