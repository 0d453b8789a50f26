//! The metrics of a daemon, fetched over HTTP and read back.

use std::collections::BTreeMap;
use std::time::Duration;

use http_body_util::{BodyExt, Limited};
use hyper::header::HOST;
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Longest text that is read, in bytes: a daemon's has some ten thousand.
const TEXT_LEN_BYTES_MAX: usize = 4 << 20;

/// The text at `url`, which may leave `/metrics` out.
///
/// # Errors
/// What was seen instead.
pub(super) async fn fetch(url: &str, patience: Duration) -> Result<String, String> {
    match tokio::time::timeout(patience, fetch_unhurried(url)).await {
        Ok(result) => result,
        Err(_) => Err(format!("no answer within {patience:?} (--timeout-s)")),
    }
}

async fn fetch_unhurried(url: &str) -> Result<String, String> {
    let uri: Uri = url.parse().map_err(|error| format!("{error}; expected http://host:port/metrics"))?;
    let (Some("http"), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
        return Err("expected http://host:port/metrics".to_owned());
    };
    let path = if uri.path() == "/" { "/metrics" } else { uri.path() };
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    let stream = TcpStream::connect((host, authority.port_u16().unwrap_or(80))).await.map_err(|e| e.to_string())?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    let exchange = async {
        let request = Request::get(path)
            .header(HOST, authority.as_str())
            .body(String::new())
            .map_err(|error| error.to_string())?;
        let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = response.status();
        let body = Limited::new(response.into_body(), TEXT_LEN_BYTES_MAX).collect().await.map_err(|e| e.to_string())?;
        let text = String::from_utf8(body.to_bytes().into()).map_err(|error| error.to_string())?;
        if status.is_success() { Ok(text) } else { Err(format!("{status}: {}", text.trim())) }
    };
    tokio::pin!(exchange);
    tokio::select! {
        result = &mut exchange => result,
        // The connection may be through before what it brought has been read.
        ended = connection => match ended {
            Ok(()) => exchange.await,
            Err(error) => Err(error.to_string()),
        },
    }
}

/// One value of one metric.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sample {
    /// With its unit and, for a counter, `_total`.
    pub(super) name: String,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) value: f64,
}

/// Every sample of a text that Prometheus could read.
///
/// # Errors
/// The first line that is none.
pub(super) fn parse(text: &str) -> Result<Vec<Sample>, String> {
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(|line| sample(line).ok_or_else(|| format!("not a sample: {line:?}"))).collect()
}

fn sample(line: &str) -> Option<Sample> {
    let name_end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(name_end);
    let mut labels = BTreeMap::new();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        while !rest.starts_with('}') {
            let (label, after) = rest.trim_start_matches(',').split_once("=\"")?;
            let (value, after) = quoted(after)?;
            labels.insert(label.to_owned(), value);
            rest = after;
        }
        rest = rest.strip_prefix('}')?;
    }
    let value = rest.split_ascii_whitespace().next()?.parse().ok()?;
    Some(Sample { name: name.to_owned(), labels, value })
}

/// What is before the closing quotation mark, and what follows it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => match characters.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_read_with_whatever_is_in_their_labels() {
        // Broken in production: `pd-bench status` shows zeros, or panics on what some other server says.
        let text = "# TYPE a counter\na_total 3\nb{x=\"1\",y=\"}, \\\"\\\\\\n\"} 0.5\n\nc{} 7 1700000000\n# EOF\n";
        let samples = parse(text).unwrap();
        let labels = BTreeMap::from([("x".to_owned(), "1".to_owned()), ("y".to_owned(), "}, \"\\\n".to_owned())]);
        assert_eq!(samples[0], Sample { name: "a_total".into(), labels: BTreeMap::new(), value: 3.0 });
        assert_eq!(samples[1], Sample { name: "b".into(), labels, value: 0.5 });
        assert_eq!(samples[2], Sample { name: "c".into(), labels: BTreeMap::new(), value: 7.0 });
        for line in ["<html>", "a", "a{", "a{x=\"1", "a{x}1", "a one", "a{x=\"1\"", "{\u{e9}", "a{x=\"\\"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
