//! A small strict JSON reader for filters.
//!
//! It reads untrusted bytes inside a proxy, so it is bounded in depth and in members per
//! object, never panics, and refuses duplicate names: two readers that pick different
//! duplicates would disagree about what a token says. Numbers are kept as integers only;
//! float parsing would be a tenth of a filter's size.

/// Deepest nesting accepted.
const MAX_DEPTH: usize = 16;
/// Most members of one object; bounds the search for duplicates.
const MAX_MEMBERS: usize = 256;

/// A JSON value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Null,
    Bool(bool),
    Number(Number),
    String(String),
    Array(Vec<Value>),
    Object(Vec<(String, Value)>),
}

/// A JSON number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Number {
    /// The integer part; None with an exponent or outside i64.
    pub integer: Option<i64>,
    /// Whether the number has neither fraction nor exponent.
    pub whole: bool,
}

/// Why and where a text is no JSON.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SyntaxError {
    /// Byte offset of the fault.
    pub offset: usize,
    pub reason: &'static str,
}

impl Value {
    /// What the value is, in the words of an error message.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Null => "null",
            Value::Bool(_) => "a boolean",
            Value::Number(_) => "a number",
            Value::String(_) => "a string",
            Value::Array(_) => "a list",
            Value::Object(_) => "an object",
        }
    }

    /// The member of that name, if the value is an object that has it.
    pub fn get(&self, name: &str) -> Option<&Value> {
        match self {
            Value::Object(members) => members.iter().find(|(n, _)| n == name).map(|(_, v)| v),
            _ => None,
        }
    }

    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// The value as a whole number that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Value::Number(Number { integer: Some(n), whole: true }) => u64::try_from(*n).ok(),
            _ => None,
        }
    }
}

/// Reads exactly one JSON value, with nothing but white space around it.
pub fn parse(text: &[u8]) -> Result<Value, SyntaxError> {
    let mut reader = Reader { text, at: 0 };
    let value = reader.value(0)?;
    reader.space();
    match reader.peek() {
        None => Ok(value),
        Some(_) => Err(reader.fault("text after the value")),
    }
}

struct Reader<'a> {
    text: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn fault(&self, reason: &'static str) -> SyntaxError {
        SyntaxError { offset: self.at, reason }
    }

    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn take(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        if found {
            self.at += 1;
        }
        found
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn word(&mut self, word: &[u8], value: Value) -> Result<Value, SyntaxError> {
        if self.text.get(self.at..).is_some_and(|rest| rest.starts_with(word)) {
            self.at += word.len();
            Ok(value)
        } else {
            Err(self.fault("not a JSON value"))
        }
    }

    fn value(&mut self, depth: usize) -> Result<Value, SyntaxError> {
        if depth > MAX_DEPTH {
            return Err(self.fault("nested too deeply"));
        }
        self.space();
        match self.peek() {
            None => Err(self.fault("the text ends too early")),
            Some(b'{') => self.object(depth),
            Some(b'[') => self.array(depth),
            Some(b'"') => self.string().map(Value::String),
            Some(b't') => self.word(b"true", Value::Bool(true)),
            Some(b'f') => self.word(b"false", Value::Bool(false)),
            Some(b'n') => self.word(b"null", Value::Null),
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(_) => Err(self.fault("not a JSON value")),
        }
    }

    fn object(&mut self, depth: usize) -> Result<Value, SyntaxError> {
        self.at += 1;
        let mut members: Vec<(String, Value)> = Vec::new();
        self.space();
        if self.take(b'}') {
            return Ok(Value::Object(members));
        }
        loop {
            self.space();
            if self.peek() != Some(b'"') {
                return Err(self.fault("a quoted name is missing"));
            }
            let start = self.at;
            let name = self.string()?;
            if members.iter().any(|(n, _)| *n == name) {
                return Err(SyntaxError { offset: start, reason: "the name stands twice" });
            }
            if members.len() == MAX_MEMBERS {
                return Err(self.fault("too many members"));
            }
            self.space();
            if !self.take(b':') {
                return Err(self.fault("a colon is missing"));
            }
            let value = self.value(depth + 1)?;
            members.push((name, value));
            self.space();
            if self.take(b'}') {
                return Ok(Value::Object(members));
            }
            if !self.take(b',') {
                return Err(self.fault("a comma or } is missing"));
            }
        }
    }

    fn array(&mut self, depth: usize) -> Result<Value, SyntaxError> {
        self.at += 1;
        let mut items = Vec::new();
        self.space();
        if self.take(b']') {
            return Ok(Value::Array(items));
        }
        loop {
            items.push(self.value(depth + 1)?);
            self.space();
            if self.take(b']') {
                return Ok(Value::Array(items));
            }
            if !self.take(b',') {
                return Err(self.fault("a comma or ] is missing"));
            }
        }
    }

    fn string(&mut self) -> Result<String, SyntaxError> {
        self.at += 1;
        let mut out: Vec<u8> = Vec::new();
        loop {
            let Some(byte) = self.peek() else {
                return Err(self.fault("a string does not end"));
            };
            self.at += 1;
            match byte {
                b'"' => break,
                b'\\' => self.escape(&mut out)?,
                0..=0x1f => return Err(self.fault("a control character in a string")),
                _ => out.push(byte),
            }
        }
        String::from_utf8(out).map_err(|_| self.fault("a string is not UTF-8"))
    }

    fn escape(&mut self, out: &mut Vec<u8>) -> Result<(), SyntaxError> {
        let byte = self.peek();
        self.at += 1;
        out.push(match byte {
            Some(b @ (b'"' | b'\\' | b'/')) => b,
            Some(b'b') => 0x08,
            Some(b'f') => 0x0c,
            Some(b'n') => b'\n',
            Some(b'r') => b'\r',
            Some(b't') => b'\t',
            Some(b'u') => {
                let c = self.unicode()?;
                out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                return Ok(());
            }
            _ => return Err(self.fault("a bad escape in a string")),
        });
        Ok(())
    }

    fn unicode(&mut self) -> Result<char, SyntaxError> {
        let first = self.hex4()?;
        let mut code = first;
        if (0xd800..0xdc00).contains(&first) && self.take(b'\\') && self.take(b'u') {
            let second = self.hex4()?;
            if (0xdc00..0xe000).contains(&second) {
                code = 0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00);
            }
        }
        // A surrogate on its own is left, and is no char.
        char::from_u32(code).ok_or_else(|| self.fault("a bad escape in a string"))
    }

    fn hex4(&mut self) -> Result<u32, SyntaxError> {
        let mut code = 0;
        for _ in 0..4 {
            let digit = match self.peek() {
                Some(b @ b'0'..=b'9') => b - b'0',
                Some(b @ b'a'..=b'f') => b - b'a' + 10,
                Some(b @ b'A'..=b'F') => b - b'A' + 10,
                _ => return Err(self.fault("a bad escape in a string")),
            };
            self.at += 1;
            code = code << 4 | u32::from(digit);
        }
        Ok(code)
    }

    fn number(&mut self) -> Result<Value, SyntaxError> {
        let negative = self.take(b'-');
        let mut integer = Some(0i64);
        let start = self.at;
        while let Some(digit @ b'0'..=b'9') = self.peek() {
            let digit = i64::from(digit - b'0');
            integer = integer.and_then(|n| n.checked_mul(10)).and_then(|n| {
                if negative {
                    n.checked_sub(digit)
                } else {
                    n.checked_add(digit)
                }
            });
            self.at += 1;
        }
        let digits = self.at - start;
        if digits == 0 || (digits > 1 && self.text.get(start) == Some(&b'0')) {
            return Err(self.fault("a bad number"));
        }
        let mut whole = true;
        if self.take(b'.') {
            whole = false;
            self.digits()?;
        }
        if self.take(b'e') || self.take(b'E') {
            whole = false;
            integer = None;
            let _ = self.take(b'+') || self.take(b'-');
            self.digits()?;
        }
        Ok(Value::Number(Number { integer, whole }))
    }

    fn digits(&mut self) -> Result<(), SyntaxError> {
        let start = self.at;
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.at += 1;
        }
        if self.at == start {
            return Err(self.fault("a bad number"));
        }
        Ok(())
    }
}

/// Names a place in a configuration and what is wrong there, for the one line a filter
/// logs when it refuses. Values are never part of it: one of them may be a key.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal(pub String);

impl Refusal {
    /// `field: cause; remedy`, with the field name cut and cleaned: it may be the user's.
    pub fn new(field: &str, cause: &str, remedy: &str) -> Refusal {
        let mut text = String::with_capacity(field.len() + cause.len() + remedy.len() + 4);
        for c in field.chars().take(80) {
            text.push(if c.is_control() { '?' } else { c });
        }
        for part in [": ", cause, "; ", remedy] {
            text.push_str(part);
        }
        Refusal(text)
    }
}

/// Reads a whole configuration, which must be one JSON object of at most 64 KiB.
pub fn configuration(bytes: &[u8]) -> Result<Value, Refusal> {
    const FIELD: &str = "configuration";
    if bytes.len() > 64 << 10 {
        return Err(Refusal::new(FIELD, "is larger than 64 KiB", "shorten it"));
    }
    match parse(bytes) {
        Ok(value @ Value::Object(_)) => Ok(value),
        Ok(other) => {
            let cause = ["is ", other.kind(), ", not an object"].concat();
            Err(Refusal::new(FIELD, &cause, "write one JSON object"))
        }
        Err(fault) => {
            let cause =
                ["is no JSON: ", fault.reason, " at byte ", &fault.offset.to_string()].concat();
            Err(Refusal::new(FIELD, &cause, "write one JSON object"))
        }
    }
}

/// The object at `field`, having no other members than the known ones.
pub fn object<'v>(
    field: &str,
    value: &'v Value,
    known: &[&str],
) -> Result<&'v [(String, Value)], Refusal> {
    let members = members(field, value)?;
    for (name, _) in members {
        if !known.contains(&name.as_str()) {
            let remedy = ["use one of ", &known.join(", ")].concat();
            return Err(Refusal::new(&within(field, name), "is not a known field", &remedy));
        }
    }
    Ok(members)
}

/// The members of the object at `field`, whatever their names.
pub fn members<'v>(field: &str, value: &'v Value) -> Result<&'v [(String, Value)], Refusal> {
    match value {
        Value::Object(members) => Ok(members),
        other => Err(wrong(field, other, "an object")),
    }
}

/// The string at `field`.
pub fn string<'v>(field: &str, value: &'v Value) -> Result<&'v str, Refusal> {
    value.as_str().ok_or_else(|| wrong(field, value, "a string"))
}

/// The list at `field`.
pub fn list<'v>(field: &str, value: &'v Value) -> Result<&'v [Value], Refusal> {
    match value {
        Value::Array(items) => Ok(items),
        other => Err(wrong(field, other, "a list")),
    }
}

/// The whole number at `field`, from least to most.
pub fn integer(field: &str, value: &Value, least: u64, most: u64) -> Result<u64, Refusal> {
    match value.as_u64() {
        Some(n) if (least..=most).contains(&n) => Ok(n),
        found => {
            let range =
                ["a whole number from ", &least.to_string(), " to ", &most.to_string()].concat();
            match (found, value) {
                (None, Value::Number(_)) | (Some(_), _) => {
                    Err(Refusal::new(field, "is out of range", &["write ", &range].concat()))
                }
                _ => Err(wrong(field, value, &range)),
            }
        }
    }
}

/// A header name in lower case. Pseudo-headers and those that frame a message are refused:
/// changing them breaks the request instead of marking it.
pub fn header_name(field: &str, name: &str) -> Result<String, Refusal> {
    const FRAMING: [&str; 6] =
        ["connection", "content-length", "host", "te", "transfer-encoding", "upgrade"];
    let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    if name.is_empty() || name.len() > 128 || !name.bytes().all(token) {
        return Err(Refusal::new(
            field,
            "is not a header name",
            "use 1 to 128 letters, digits and dashes",
        ));
    }
    let name = name.to_ascii_lowercase();
    if FRAMING.contains(&name.as_str()) {
        return Err(Refusal::new(
            field,
            "names a header that frames the message",
            "use another header",
        ));
    }
    Ok(name)
}

/// A header value: visible ASCII, spaces and tabs, at most 4096 bytes.
pub fn header_value<'v>(field: &str, value: &'v Value) -> Result<&'v str, Refusal> {
    let text = string(field, value)?;
    if text.len() > 4096 || !text.bytes().all(|b| b == b'\t' || (b' '..=b'~').contains(&b)) {
        return Err(Refusal::new(
            field,
            "is not a header value",
            "use at most 4096 printable ASCII characters",
        ));
    }
    Ok(text)
}

/// The path of a field inside another one.
pub fn within(field: &str, name: &str) -> String {
    if field.is_empty() {
        name.to_string()
    } else {
        [field, ".", name].concat()
    }
}

fn wrong(field: &str, value: &Value, want: &str) -> Refusal {
    Refusal::new(field, &["is ", value.kind()].concat(), &["write ", want].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_kind_of_value() {
        let value = parse(
            br#" {"a": [null, true, false, -12, 1.5, 1e3], "b": {"c": "x\n\u00e9\ud83d\ude00"}} "#,
        );
        let value = value.expect("valid JSON");
        assert_eq!(value.get("b").and_then(|b| b.get("c")).and_then(Value::as_str), Some("x\né😀"));
        let Some(Value::Array(items)) = value.get("a") else { panic!("a is a list") };
        assert_eq!(items[3], Value::Number(Number { integer: Some(-12), whole: true }));
        assert_eq!(items[4], Value::Number(Number { integer: Some(1), whole: false }));
        assert_eq!(items[5], Value::Number(Number { integer: None, whole: false }));
    }

    #[test]
    fn refuses_what_is_no_json() {
        let cases: [&[u8]; 22] = [
            b"",
            b" ",
            b"{",
            b"[",
            b"\"",
            b"{]",
            b"[}",
            b"{\"a\"}",
            b"{\"a\":}",
            b"{\"a\":1,}",
            b"[1,]",
            b"01",
            b"-",
            b"1.",
            b"1e",
            b"tru",
            b"\"\x01\"",
            b"\"\\x\"",
            b"\"\\ud800\"",
            b"\"\xff\"",
            b"1 2",
            b"{\"a\":1,\"a\":2}",
        ];
        for case in cases {
            assert!(parse(case).is_err(), "{:?} was accepted", String::from_utf8_lossy(case));
        }
    }

    #[test]
    fn bounds_depth_and_members() {
        assert!(parse(&[b'['; 1 << 20]).is_err());
        let many: Vec<String> = (0..300).map(|i| format!("\"{i}\":1")).collect();
        assert!(parse(format!("{{{}}}", many.join(",")).as_bytes()).is_err());
    }

    #[test]
    fn never_panics_on_mutated_text() {
        let seed = br#"{"plans":{"Personal":10},"x":[1,-2.5e+7,"\ud83d\ude00\n",true,null]}"#;
        let mut random = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = move || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        for _ in 0..200_000 {
            let mut text = seed.to_vec();
            for _ in 0..next() % 6 {
                let at = next() as usize % text.len();
                match next() % 3 {
                    0 => text[at] = next() as u8,
                    1 => text.truncate(at.max(1)),
                    _ => text.insert(at, b"{}[]\",:\\u0eE-.\xff"[next() as usize % 15]),
                }
            }
            let _ = parse(&text);
        }
    }

    #[test]
    fn a_refusal_is_one_line_without_control_characters() {
        let refusal = Refusal::new("a\nb", "is bad", "mend it");
        assert_eq!(refusal.0, "a?b: is bad; mend it");
    }
}
