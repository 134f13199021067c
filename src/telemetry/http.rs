//! The metrics, the status and its page over HTTP. Nothing can be changed here.

use std::io;
use std::net::{IpAddr, TcpListener};
use std::thread;

use log::warn;
use tiny_http::{Header, Method, Request, Response, Server};

use super::prometheus;

/// The page: it asks for the status every second and draws it. It loads nothing from anywhere else.
const PAGE: &str = include_str!("status.html");

/// Serves `/metrics` (Prometheus), `/status.json` (what `status` makes) and `/` (a page that shows it) on `listener`, in
/// a thread of its own, as long as the process lives. `status` also brings those metrics up to date that nobody counts.
///
/// # Errors
/// When the address cannot be listened on or no thread be started.
pub fn serve_metrics(listener: TcpListener, status: impl Fn() -> String + Send + 'static) -> io::Result<()> {
    // Elsewhere than on loopback, a name is how one reaches us; who may is for a firewall to say.
    let any_host = !listener.local_addr()?.ip().is_loopback();
    let server = Server::from_listener(listener, None).map_err(io::Error::other)?;
    let serve = move || {
        for request in server.incoming_requests() {
            let response = respond(&request, any_host, &status);
            if let Err(error) = request.respond(response) {
                log::debug!("metrics: an answer was not sent: {error}"); // whoever asked has gone
            }
        }
        warn!("metrics: no longer served");
    };
    thread::Builder::new().name("metrics".to_owned()).spawn(serve).map(drop)
}

fn respond(request: &Request, any_host: bool, status: &dyn Fn() -> String) -> Response<io::Cursor<Vec<u8>>> {
    let host = request.headers().iter().find(|header| header.field.equiv("Host"));
    if !any_host && !host.is_none_or(|host| is_plain_host(host.value.as_str())) {
        return answer(403, "text/plain", "expected an IP address or localhost as the host\n".to_owned());
    }
    if !matches!(request.method(), Method::Get | Method::Head) {
        return answer(405, "text/plain", "nothing can be changed here\n".to_owned());
    }
    match request.url().split('?').next() {
        Some("/metrics") => {
            status(); // for the gauges it sets
            answer(200, "text/plain; version=0.0.4; charset=utf-8", prometheus::text())
        }
        Some("/status.json") => answer(200, "application/json", status()),
        Some("/") => answer(200, "text/html; charset=utf-8", PAGE.to_owned()),
        _ => answer(404, "text/plain", "expected /, /metrics or /status.json\n".to_owned()),
    }
}

/// Whether the name under which a browser found us is one that no stranger's page can make its own: an address, or
/// `localhost`. A page elsewhere whose name suddenly means 127.0.0.1 must not read what is served here.
fn is_plain_host(host: &str) -> bool {
    let without_port = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !name.is_empty() => name,
        _ => host,
    };
    let name = without_port.trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || name.parse::<IpAddr>().is_ok()
}

fn answer(code: u16, kind: &str, text: String) -> Response<io::Cursor<Vec<u8>>> {
    let header = |name: &str, value: &str| Header::from_bytes(name, value).expect("it is ASCII");
    let rules = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'";
    Response::from_string(text)
        .with_status_code(code)
        .with_header(header("Content-Type", kind))
        .with_header(header("Cache-Control", "no-store"))
        .with_header(header("X-Content-Type-Options", "nosniff"))
        .with_header(header("Content-Security-Policy", rules))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;

    use super::*;

    fn ask(port: u16, request: &str) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn metrics_status_and_page_are_served_and_nothing_else() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        serve_metrics(listener, || "{\"archives\": []}".to_owned()).unwrap();
        let get =
            |path| ask(port, &format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n"));
        let metrics = get("/metrics");
        assert!(metrics.starts_with("HTTP/1.1 200") && metrics.contains("version=0.0.4"), "{metrics}");
        assert!(metrics.contains("\n# TYPE mcwcfs_read_bytes_total counter\nmcwcfs_read_bytes_total "), "{metrics}");
        assert!(get("/status.json").ends_with("{\"archives\": []}"));
        assert!(get("/").contains("<title>mcwcfs"));
        for path in ["/etc/passwd", "/../../etc/passwd", "//", "/metrics/"] {
            assert!(get(path).starts_with("HTTP/1.1 404"), "{path}");
        }
        for method in ["POST", "PUT", "DELETE", "PATCH"] {
            let request = format!(
                "{method} /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
            assert!(ask(port, &request).starts_with("HTTP/1.1 405"), "{method}");
        }
        let foreign = "GET /metrics HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n";
        assert!(ask(port, foreign).starts_with("HTTP/1.1 403"));
    }

    #[test]
    fn a_host_is_plain_if_no_name_service_was_asked_for_it() {
        for host in ["localhost", "localhost:9", "127.0.0.1", "10.0.0.1:9464", "[::1]", "[::1]:80"] {
            assert!(is_plain_host(host), "{host}");
        }
        for host in ["", "evil.example", "localhost.evil.example:80", "127.0.0.1.nip.io", ":80"] {
            assert!(!is_plain_host(host), "{host}");
        }
    }
}
