//! What a ROUTER listens on: TCP ports and ipc names.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::SideChannelError;

/// Longest ipc path or abstract name, in bytes: what the kernel's address has room for, a final NUL included.
const IPC_NAME_LEN_BYTES_MAX: usize = 107;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// How long to wait for another process that is binding in the same directory.
const BIND_LOCK_ATTEMPTS: u32 = 50;
const BIND_LOCK_PAUSE: Duration = Duration::from_millis(20);

/// A name for an ipc socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IpcName {
    /// In Linux's abstract namespace: no file, so nothing is left behind after SIGKILL.
    Abstract(String),
    /// A socket file, mode 0600, removed at the end. One left behind by a dead process is replaced.
    Path(PathBuf),
}

impl IpcName {
    /// A new abstract name, `pd-backend/<role>-<pid>-<random>`.
    pub fn new_abstract(role: &str) -> Self {
        Self::Abstract(format!("pd-backend/{role}-{}-{:016x}", std::process::id(), rand::random::<u64>()))
    }

    /// Reads `ipc://@name`, `ipc:///path` or a path.
    ///
    /// # Errors
    /// [`SideChannelError::InvalidAddress`] when it is empty, or longer than the kernel can hold.
    pub fn parse(text: &str) -> Result<Self, SideChannelError> {
        let invalid = |reason: String| SideChannelError::InvalidAddress { address: text.to_owned(), reason };
        let name = text.strip_prefix("ipc://").unwrap_or(text);
        let (name, parsed) = match name.strip_prefix('@') {
            Some(name) => (name, Self::Abstract(name.to_owned())),
            None => (name, Self::Path(PathBuf::from(name))),
        };
        if name.is_empty() || name.contains(['\0', '\n']) {
            return Err(invalid("expected ipc://@name or ipc:///path, without NUL or line breaks".to_owned()));
        }
        if name.len() > IPC_NAME_LEN_BYTES_MAX {
            return Err(invalid(format!(
                "it has {} bytes, the kernel takes {IPC_NAME_LEN_BYTES_MAX}; choose a shorter one",
                name.len()
            )));
        }
        Ok(parsed)
    }

    /// As ZeroMQ peers connect to it.
    pub fn endpoint(&self) -> String {
        match self {
            Self::Abstract(name) => format!("ipc://@{name}"),
            Self::Path(path) => format!("ipc://{}", path.display()),
        }
    }
}

/// `tcp://host:port`, with brackets around an IPv6 address.
pub fn tcp_address(host: &str, port: u16) -> String {
    if host.contains(':') && !host.starts_with('[') {
        format!("tcp://[{host}]:{port}")
    } else {
        format!("tcp://{host}:{port}")
    }
}

/// A listener on a port, and the port.
pub(super) async fn tcp(host: &str, port: u16) -> Result<(TcpListener, u16), SideChannelError> {
    let address = tcp_address(host, port);
    let bare_host = host.trim_start_matches('[').trim_end_matches(']');
    let candidates =
        tokio::net::lookup_host((bare_host, port)).await.map_err(|error| SideChannelError::InvalidAddress {
            address: address.clone(),
            reason: format!("{error}; expected a host name or an address of this machine"),
        })?;
    let candidates: Vec<_> = candidates.collect();
    let listener = TcpListener::bind(&candidates[..]).map_err(|error| bind_error(&address, error))?;
    let port = listener.local_addr().map_err(|error| bind_error(&address, error))?.port();
    Ok((listener, port))
}

/// A listener on an ipc name, and what removes its file.
pub(super) async fn ipc(name: &IpcName) -> Result<(UnixListener, Option<BoundPath>), SideChannelError> {
    let address = name.endpoint();
    match name {
        IpcName::Abstract(name) => SocketAddr::from_abstract_name(name)
            .and_then(|name| UnixListener::bind_addr(&name))
            .map(|listener| (listener, None))
            .map_err(|error| bind_error(&address, error)),
        IpcName::Path(path) => {
            let _lock = lock_directory(path).await.map_err(|error| bind_error(&address, error))?;
            let (listener, bound) = bind_path(path).map_err(|error| bind_error(&address, error))?;
            Ok((listener, Some(bound)))
        }
    }
}

/// Removes a socket file when the socket is dropped, unless the path leads to another one by then.
#[derive(Debug)]
pub(super) struct BoundPath {
    path: PathBuf,
    inode: u64,
}

impl Drop for BoundPath {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.inode) {
            // Whether it works or not, the next process that binds here copes.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn bind_error(address: &str, source: io::Error) -> SideChannelError {
    let address = address.to_owned();
    match source.kind() {
        io::ErrorKind::AddrInUse => SideChannelError::AddressInUse { address },
        _ => SideChannelError::Bind { address, source },
    }
}

/// Keeps two processes from replacing the same stale file, the slower one the faster one's fresh file. The lock is on
/// the directory itself, so it leaves nothing behind and ends with the process.
async fn lock_directory(path: &Path) -> io::Result<OwnedFd> {
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let directory = rustix::fs::open(directory, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    for _ in 0..BIND_LOCK_ATTEMPTS {
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => tokio::time::sleep(BIND_LOCK_PAUSE).await,
            Err(error) => return Err(error.into()),
            Ok(()) => return Ok(directory),
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "another process keeps the directory locked"))
}

/// Nobody can connect between `bind` and `listen`, so the file has its mode before anybody gets in, whatever the
/// umask says.
fn bind_path(path: &Path) -> io::Result<(UnixListener, BoundPath)> {
    remove_stale(path)?;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    let bound = BoundPath { path: path.to_owned(), inode: fs::symlink_metadata(path)?.ino() };
    rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok((UnixListener::from(socket), bound))
}

/// Removes a socket file that nobody listens on.
fn remove_stale(path: &Path) -> io::Result<()> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !metadata.file_type().is_socket() {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "it exists and is no socket; remove it or choose another path",
        ));
    }
    let probe = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    match rustix::net::connect(&probe, &SocketAddrUnix::new(path)?) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path),
        Err(Errno::NOENT) => Ok(()),
        // Somebody listens, too busy to accept.
        Ok(()) | Err(Errno::AGAIN) => Err(io::ErrorKind::AddrInUse.into()),
        Err(error) => Err(error.into()),
    }
}
