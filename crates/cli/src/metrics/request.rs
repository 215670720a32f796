//! What is answered to an HTTP request: its head says all.

use prometheus_client::encoding::prometheus_text::CONTENT_TYPE;

/// The longest head of a request in bytes.
pub(super) const HEAD_BYTES: usize = 8 << 10;

/// Header fields of a request.
const FIELDS: usize = 64;

/// What the bytes of a request so far make of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Nothing: the head is not over.
    Wait,
    /// A response that is ready to be sent.
    Text(Vec<u8>),
    /// The metrics, or only how long they are (HEAD).
    Metrics { with_body: bool },
}

/// Looks at the head of a request.
pub(super) fn answer(bytes: &[u8]) -> Answer {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) if bytes.len() < HEAD_BYTES => return Answer::Wait,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            return plain(
                "431 Request Header Fields Too Large",
                "",
                "too much\n",
                true,
            );
        }
        Err(error) => {
            return plain(
                "400 Bad Request",
                "",
                &format!("not an HTTP request: {error}\n"),
                true,
            );
        }
    }
    let path = request.path.unwrap_or_default();
    let path = path.split_once('?').map_or(path, |(path, _)| path);
    let with_body = request.method != Some("HEAD");
    match (request.method, path) {
        (Some("GET" | "HEAD"), "/metrics") => Answer::Metrics { with_body },
        (Some("GET" | "HEAD"), "/") => plain("200 OK", "", "urus: see /metrics\n", with_body),
        (Some("GET" | "HEAD"), _) => plain("404 Not Found", "", "see /metrics\n", with_body),
        _ => plain(
            "405 Method Not Allowed",
            "Allow: GET, HEAD\r\n",
            "only GET and HEAD\n",
            with_body,
        ),
    }
}

fn plain(status: &str, fields: &str, body: &str, with_body: bool) -> Answer {
    Answer::Text(response(
        status,
        "text/plain; charset=utf-8",
        fields,
        body,
        with_body,
    ))
}

/// The metrics as a response.
pub(super) fn metrics(body: &str, with_body: bool) -> Vec<u8> {
    response("200 OK", CONTENT_TYPE, "", body, with_body)
}

fn response(status: &str, content: &str, fields: &str, body: &str, with_body: bool) -> Vec<u8> {
    let length = body.len();
    let body = if with_body { body } else { "" };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content}\r\nContent-Length: {length}\r\nConnection: close\r\n{fields}\r\n{body}"
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    //! Guards what scrapers are told, and against waiting for more from one that has said enough.
    use super::*;

    fn status(bytes: &[u8]) -> String {
        match answer(bytes) {
            Answer::Text(text) => String::from_utf8(text).unwrap()[9..12].to_owned(),
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn requests_are_told_apart() {
        let metrics = format!("{:?}", Answer::Metrics { with_body: true });
        for (request, expected) in [
            ("GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n", &*metrics),
            ("GET /metrics HTTP/1.0\r\n\r\n", &metrics),
            (
                "GET /metrics?name=urus HTTP/1.1\r\nAccept: */*\r\n\r\nmore",
                &metrics,
            ),
            ("GET / HTTP/1.1\r\n\r\n", "200"),
            ("GET /metrics/ HTTP/1.1\r\n\r\n", "404"),
            ("GET /etc/passwd HTTP/1.1\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
            ("OPTIONS * HTTP/1.1\r\n\r\n", "405"),
            ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "400"),
            ("\x16\x03\x01\x02", "400"),
            ("GET /metrics\r\n\r\n", "400"),
            ("", "Wait"),
            ("GET /metrics HTTP/1.1\r\nHost: a\r\n", "Wait"),
        ] {
            assert_eq!(status(request.as_bytes()), expected, "{request:?}");
        }
        let answer = answer(b"HEAD /metrics HTTP/1.1\r\n\r\n");
        assert_eq!(answer, Answer::Metrics { with_body: false });
    }

    #[test]
    fn heads_are_bounded() {
        let endless = [b"GET / HTTP/1.1\r\nX: ".as_slice(), &[b'a'; HEAD_BYTES]].concat();
        assert_eq!(status(&endless[..HEAD_BYTES - 1]), "Wait");
        assert_eq!(status(&endless[..HEAD_BYTES]), "431");
        let many = format!("GET / HTTP/1.1\r\n{}", "a: b\r\n".repeat(FIELDS + 1));
        assert_eq!(status(many.as_bytes()), "431");
    }

    #[test]
    fn a_head_tells_the_length_and_sends_nothing() {
        let (with, without) = (metrics("a 1\n", true), metrics("a 1\n", false));
        assert!(with.ends_with(b"\r\n\r\na 1\n") && with.starts_with(&without));
        assert!(
            String::from_utf8(without)
                .unwrap()
                .contains("Content-Length: 4\r\n")
        );
    }
}
