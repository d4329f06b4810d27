//! Sets headers on every request and response; see README.md beside it.

use json::{header_name, header_value, members, object, within, Refusal, Value};

#[cfg(target_arch = "wasm32")]
mod host;

/// What the filter sets, in the order of the configuration; names in lower case.
#[derive(Debug, Default, PartialEq)]
pub struct Config {
    pub request: Vec<(String, String)>,
    pub response: Vec<(String, String)>,
}

impl Config {
    /// Reads the filter's configuration; an empty one is a mistake, since such a filter
    /// would do nothing.
    pub fn parse(bytes: &[u8]) -> Result<Config, Refusal> {
        let root = json::configuration(bytes)?;
        let mut config = Config::default();
        for (name, value) in object("", &root, &["request", "response"])? {
            let headers = headers(name, value)?;
            if name == "request" {
                config.request = headers;
            } else {
                config.response = headers;
            }
        }
        if config.request.is_empty() && config.response.is_empty() {
            return Err(Refusal::new(
                "configuration",
                "sets no header",
                "name at least one in request or response",
            ));
        }
        Ok(config)
    }
}

fn headers(field: &str, value: &Value) -> Result<Vec<(String, String)>, Refusal> {
    let mut headers: Vec<(String, String)> = Vec::new();
    for (name, value) in members(field, value)? {
        let place = within(field, name);
        let name = header_name(&place, name)?;
        let value = header_value(&place, value)?;
        if headers.iter().any(|(n, _)| *n == name) {
            return Err(Refusal::new(&place, "stands twice", "header names ignore case; keep one"));
        }
        headers.push((name, value.to_string()));
    }
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_both_directions_in_order() {
        let config = Config::parse(br#"{"request":{"X-A":"1"},"response":{"X-B":"2","x-c":""}}"#);
        let pair = |a: &str, b: &str| (a.to_string(), b.to_string());
        assert_eq!(
            config,
            Ok(Config {
                request: vec![pair("x-a", "1")],
                response: vec![pair("x-b", "2"), pair("x-c", "")],
            })
        );
    }

    #[test]
    fn refuses_a_bad_configuration_with_field_cause_and_remedy() {
        let cases: [(&[u8], &str); 10] = [
            (b"", "configuration: is no JSON: the text ends too early at byte 0; write one JSON object"),
            (b"[]", "configuration: is a list, not an object; write one JSON object"),
            (b"{}", "configuration: sets no header; name at least one in request or response"),
            (br#"{"reqest":{}}"#, "reqest: is not a known field; use one of request, response"),
            (br#"{"request":[]}"#, "request: is a list; write an object"),
            (br#"{"request":{"a":1}}"#, "request.a: is a number; write a string"),
            (br#"{"request":{":path":"/"}}"#, "request.:path: is not a header name; use 1 to 128 letters, digits and dashes"),
            (br#"{"response":{"Content-Length":"1"}}"#, "response.Content-Length: names a header that frames the message; use another header"),
            (br#"{"response":{"a":"x\r\ny: z"}}"#, "response.a: is not a header value; use at most 4096 printable ASCII characters"),
            (br#"{"response":{"a":"x","A":"y"}}"#, "response.A: stands twice; header names ignore case; keep one"),
        ];
        for (text, want) in cases {
            assert_eq!(Config::parse(text), Err(Refusal(want.to_string())));
        }
    }
}
