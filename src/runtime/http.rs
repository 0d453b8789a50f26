//! `/metrics`, `/healthz` and `/readyz` over HTTP, on a thread of their own: whoever asks, however slowly and however
//! often, takes nothing from the driver but one answer at a time.
//!
//! hyper does the protocol: the HTTP implementation that the rest of Rust's servers stand on, used here with HTTP/1
//! alone. Connections, headers and times are bounded, and a connection serves one request.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{ACCEPT, ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::AbortHandle;
use tokio::task::yield_now;
use tokio::time::{sleep, timeout};

use super::error::RuntimeError;
use super::health::{ANSWER_TIME_MAX, HealthProbe, NoAnswer, Phase};
use super::probe::ENGINE_TIME_MAX;
use super::usage::process_usage;
use crate::config::MetricsConfig;
use crate::metrics::{CONTENT_TYPE_OPEN_METRICS, CONTENT_TYPE_TEXT, exposition};

/// Connections served at a time. When there are more, the oldest whose request has not come is hung up on, so that a
/// probe is answered although others come and say nothing.
const CONNECTIONS_MAX: usize = 64;
/// How long a connection may take from first to last byte. More than the driver and the engine's thread may take to answer.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(8);
/// How long a request's headers may take to arrive.
const HEADERS_TIME_MAX: Duration = Duration::from_secs(2);
/// Longest request line with headers, in bytes.
const HEADERS_LEN_BYTES_MAX: usize = 16 * 1024;
/// Most headers of a request.
const HEADERS_MAX: usize = 64;
/// After a connection could not be accepted, most likely for want of file descriptors.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(200);

/// How long a connection may take.
#[derive(Debug, Clone, Copy)]
struct Times {
    headers_max: Duration,
    connection_max: Duration,
}

const TIMES: Times = Times { headers_max: HEADERS_TIME_MAX, connection_max: CONNECTION_TIME_MAX };

/// The connections whose request has not come, by age.
#[derive(Debug, Clone, Default)]
struct Silent(Arc<Mutex<BTreeMap<u64, AbortHandle>>>);

impl Silent {
    fn all(&self) -> MutexGuard<'_, BTreeMap<u64, AbortHandle>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its request has come, or it has ended.
    fn forget(&self, number: u64) {
        self.all().remove(&number);
    }

    fn hang_up_on_the_oldest(&self) {
        if let Some((_, oldest)) = self.all().pop_first() {
            oldest.abort();
        }
    }
}

/// The running server. Dropping it stops it.
#[derive(Debug)]
pub(super) struct HttpServer {
    address: SocketAddr,
    stop: Option<oneshot::Sender<Infallible>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl HttpServer {
    /// Binds, and serves on a thread of its own.
    pub(super) fn start(config: &MetricsConfig, probe: HealthProbe) -> Result<Self, RuntimeError> {
        Self::start_with(config, probe, TIMES)
    }

    fn start_with(config: &MetricsConfig, probe: HealthProbe, times: Times) -> Result<Self, RuntimeError> {
        let MetricsConfig { host, port } = config;
        let cannot = |source: io::Error| {
            RuntimeError::Machine(format!(
                "metrics cannot be served on {host}:{port}: {source}; write another pd_metrics_host or \
                 pd_metrics_port, 0 for a free port, or none"
            ))
        };
        let listener = TcpListener::bind((host.as_str(), *port)).map_err(cannot)?;
        listener.set_nonblocking(true).map_err(cannot)?;
        let address = listener.local_addr().map_err(cannot)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(cannot)?;
        let (stop, stopped) = oneshot::channel();
        let body = move || {
            runtime.block_on(async move {
                tokio::select! {
                    () = serve(listener, probe, times) => {}
                    // Nothing is ever sent: the other end is dropped.
                    _ = stopped => {}
                }
            });
        };
        let thread = thread::Builder::new().name("http".into()).spawn(body).map_err(cannot)?;
        Ok(Self { address, stop: Some(stop), thread: Some(thread) })
    }

    /// Where the metrics are.
    pub(super) fn metrics_url(&self) -> String {
        format!("http://{}/metrics", self.address)
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that serves metrics panicked");
        }
    }
}

async fn serve(listener: TcpListener, probe: HealthProbe, times: Times) {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "metrics are not served"),
    };
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let silent = Silent::default();
    for number in 0.. {
        match listener.accept().await {
            Ok((stream, _)) => {
                if places.available_permits() == 0 {
                    silent.hang_up_on_the_oldest();
                }
                let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
                let (probe, silent_too) = (probe.clone(), silent.clone());
                // No other task runs before it is among the silent ones.
                let conversation = tokio::spawn(async move {
                    let heard = || silent_too.forget(number);
                    // Whoever is too slow, or talks nonsense, is hung up on; there is nobody to tell.
                    drop(timeout(times.connection_max, converse(stream, &probe, times, &heard)).await);
                    heard();
                    drop(place);
                });
                silent.all().insert(number, conversation.abort_handle());
                // A request that is there already is heard before the next connection is looked at.
                yield_now().await;
            }
            Err(error) => {
                tracing::debug!(%error, "a connection to the metrics could not be accepted");
                sleep(ACCEPT_AGAIN_AFTER).await;
            }
        }
    }
}

async fn converse(stream: TcpStream, probe: &HealthProbe, times: Times, heard: &impl Fn()) -> Result<(), hyper::Error> {
    let service = service_fn(|request| async move {
        heard();
        Ok::<_, Infallible>(respond(&request, probe).await)
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(times.headers_max)
        .max_buf_size(HEADERS_LEN_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

async fn respond(request: &Request<Incoming>, probe: &HealthProbe) -> Response<String> {
    let path = request.uri().path();
    if !matches!(path, "/metrics" | "/healthz" | "/readyz") {
        return line(StatusCode::NOT_FOUND, "not found; there are /metrics, /healthz and /readyz");
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = line(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD");
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    let answer = match probe.ask().await {
        Ok(answer) => answer,
        Err(NoAnswer) => {
            let text = format!("the driver has not answered for {} ms", ANSWER_TIME_MAX.as_millis());
            return line(StatusCode::SERVICE_UNAVAILABLE, &text);
        }
    };
    // What is stuck is seen in its metrics as well.
    if path != "/metrics"
        && let Some(engine) = answer.engine
        && !engine.is_taken_in_time().await
    {
        let text = format!(
            "the engine's thread has taken up nothing for {} ms: nothing is transferred; restart the daemon if it stays so",
            engine.silence().as_millis().max(ENGINE_TIME_MAX.as_millis())
        );
        return line(StatusCode::SERVICE_UNAVAILABLE, &text);
    }
    match (path, answer.phase, answer.snapshot) {
        // Filling a large buffer with pages takes long, and is no reason to be killed.
        ("/healthz", Phase::Starting, _) => line(StatusCode::OK, "ok: starting"),
        ("/healthz", _, _) => line(StatusCode::OK, "ok: the driver and the engine answer"),
        ("/readyz", Phase::Serving, _) => line(StatusCode::OK, "ok: takes requests"),
        ("/readyz", Phase::Draining, _) => {
            line(StatusCode::SERVICE_UNAVAILABLE, "draining: told to stop, takes no new requests")
        }
        (_, Phase::Starting, _) | (_, _, None) => {
            line(StatusCode::SERVICE_UNAVAILABLE, "starting: no ready line has been printed yet")
        }
        (_, _, Some(snapshot)) => match exposition(snapshot, process_usage()) {
            Ok(text) => page(StatusCode::OK, content_type(request), text),
            Err(error) => line(StatusCode::INTERNAL_SERVER_ERROR, &format!("metrics cannot be written: {error}")),
        },
    }
}

/// The same text has two names: Prometheus asks for the first, and a browser shows the second.
fn content_type(request: &Request<Incoming>) -> &'static str {
    let accepted = request.headers().get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let open_metrics = accepted.into_iter().any(|value| value.contains("application/openmetrics-text"));
    if open_metrics { CONTENT_TYPE_OPEN_METRICS } else { CONTENT_TYPE_TEXT }
}

fn line(status: StatusCode, text: &str) -> Response<String> {
    page(status, "text/plain; charset=utf-8", format!("{text}\n"))
}

fn page(status: StatusCode, content_type: &'static str, text: String) -> Response<String> {
    let mut response = Response::new(text);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    // What was true a minute ago is of no use to a probe.
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::super::health::{HealthResponder, health_probe};
    use super::super::probe::{Probe, Prober};
    use super::*;
    use crate::connector::message::Status;
    use crate::metrics::{Snapshot, Tally};
    use crate::node::NodeCounts;

    fn start() -> (HttpServer, HealthResponder) {
        let (probe, responder) = health_probe();
        (HttpServer::start(&MetricsConfig { host: "127.0.0.1".into(), port: 0 }, probe).unwrap(), responder)
    }

    fn answer(responder: &mut HealthResponder, phase: Phase) {
        let (mut prober, take) = Prober::new();
        answer_with(responder, phase, prober.probe(|number| take.send(number).unwrap()));
    }

    fn answer_with(responder: &mut HealthResponder, phase: Phase, engine: Probe) {
        responder.answer(
            phase,
            Snapshot {
                status: Status::default(),
                counts: NodeCounts::default(),
                tally: Tally::new("sender", true, false),
            },
            engine,
        );
    }

    async fn get(server: &HttpServer, path: &str) -> String {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
        let mut seen = String::new();
        stream.read_to_string(&mut seen).await.unwrap();
        seen
    }

    #[tokio::test]
    async fn a_daemon_that_starts_is_alive_and_not_ready() {
        // Broken in production: a supervisor kills every daemon whose buffer takes long to fill, or a router uses it before.
        let (server, _answerer) = start();
        assert!(get(&server, "/healthz").await.starts_with("HTTP/1.1 200 "));
        for path in ["/readyz", "/metrics"] {
            let seen = get(&server, path).await;
            assert!(seen.starts_with("HTTP/1.1 503 ") && seen.contains("starting"), "{seen}");
        }
    }

    #[tokio::test]
    async fn a_driver_that_does_not_answer_is_said_by_every_path() {
        // Broken in production: a daemon that hangs looks healthy for ever, from the last that it said.
        let (server, mut responder) = start();
        answer(&mut responder, Phase::Serving);
        let (health, ready, metrics) =
            tokio::join!(get(&server, "/healthz"), get(&server, "/readyz"), get(&server, "/metrics"));
        for seen in [health, ready, metrics] {
            assert!(seen.starts_with("HTTP/1.1 503 ") && seen.contains("has not answered for 2000 ms"), "{seen}");
        }
        // It comes back.
        let driver = async {
            loop {
                responder.asked().await;
                answer(&mut responder, Phase::Serving);
            }
        };
        tokio::select! {
            seen = get(&server, "/readyz") => assert!(seen.starts_with("HTTP/1.1 200 "), "{seen}"),
            () = driver => {}
        }
    }

    #[tokio::test]
    async fn an_engine_that_takes_nothing_up_is_not_healthy_until_it_does() {
        // Broken in production: a daemon whose engine hangs inside a library moves nothing, and is reported healthy for ever.
        let (server, mut responder) = start();
        let (mut prober, take) = Prober::new();
        let mut asked = Vec::new();
        let driver = async {
            loop {
                let engine = prober.probe(|number| asked.push(number));
                answer_with(&mut responder, Phase::Serving, engine);
                responder.asked().await;
            }
        };
        let probes = async {
            let (health, ready, metrics) =
                tokio::join!(get(&server, "/healthz"), get(&server, "/readyz"), get(&server, "/metrics"));
            for seen in [health, ready] {
                assert!(
                    seen.starts_with("HTTP/1.1 503 ") && seen.contains("the engine's thread has taken up nothing"),
                    "{seen}"
                );
            }
            assert!(metrics.starts_with("HTTP/1.1 200 "), "{metrics}");
            take.send_replace(1);
            // The next question is a new one, and is taken up while it is waited for.
            let take_up = async {
                sleep(Duration::from_millis(20)).await;
                take.send_replace(2);
            };
            let (seen, ()) = tokio::join!(get(&server, "/healthz"), take_up);
            assert!(seen.starts_with("HTTP/1.1 200 "), "{seen}");
            drop(take);
            let seen = get(&server, "/healthz").await;
            assert!(seen.starts_with("HTTP/1.1 503 "), "the thread has ended: {seen}");
        };
        tokio::select! {
            () = probes => {}
            () = driver => {}
        }
        assert_eq!(asked, [1, 2, 3], "one question at a time, however often it is asked");
    }

    #[tokio::test]
    async fn connections_that_say_nothing_make_room_for_a_probe() {
        // Broken in production: a few dozen stuck scrapers, and the supervisor kills a daemon that is well.
        let (probe, _answerer) = health_probe();
        let for_ever = Duration::from_secs(3600);
        let times = Times { headers_max: for_ever, connection_max: for_ever };
        let config = MetricsConfig { host: "127.0.0.1".into(), port: 0 };
        let server = HttpServer::start_with(&config, probe, times).unwrap();
        let mut crowd = Vec::new();
        for number in 0..3 * CONNECTIONS_MAX {
            let mut stream = TcpStream::connect(server.address).await.unwrap();
            if number % 2 == 0 {
                stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: ").await.unwrap();
            }
            crowd.push(stream);
        }
        for _ in 0..CONNECTIONS_MAX {
            let seen = timeout(Duration::from_secs(20), get(&server, "/healthz")).await.expect("an answer");
            assert!(seen.starts_with("HTTP/1.1 200 "), "{seen}");
        }
        // The oldest were hung up on; a reset is as good as an end.
        let ended = timeout(Duration::from_secs(20), crowd[0].read_to_end(&mut Vec::new())).await;
        assert!(ended.is_ok(), "the oldest is still there");
        // Those that did not have to go may still ask.
        let last = crowd.last_mut().unwrap();
        last.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut seen = String::new();
        timeout(Duration::from_secs(20), last.read_to_string(&mut seen)).await.expect("an answer").unwrap();
        assert!(seen.starts_with("HTTP/1.1 200 "), "{seen}");
    }

    #[tokio::test]
    async fn nothing_is_left_of_a_server_that_was_stopped() {
        // Broken in production: the port of a daemon that has ended is still taken when it is started again.
        let (server, _answerer) = start();
        let address = server.address;
        let _open = TcpStream::connect(address).await.unwrap();
        drop(server);
        assert!(TcpStream::connect(address).await.is_err());
    }
}
