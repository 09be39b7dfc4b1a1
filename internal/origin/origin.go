// Package origin decides from the Origin header which pages may open a WebSocket.
package origin

import (
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/redact"
)

// Explain returns the reason for the refusal of a request and the attributes of its log
// line. The reason is a constant text. listed reports whether the app has listed origins.
func Explain(r *http.Request, listed bool) (why string, args []any) {
	why = "the origin is not allowed"
	args = []any{"origin", originText(r.Header["Origin"]), "host", hostText(r.Host)}
	if forwarded := r.Header.Get("X-Forwarded-Host"); forwarded != "" {
		args = append(args, "x_forwarded_host", hostText(forwarded))
	}
	var remedy string
	switch {
	case len(r.Header["Origin"]) == 1 && r.Header["Origin"][0] == nullOrigin:
		why = "the page has no origin" // another line, because its remedy differs
		remedy = "serve the page by HTTP, and not from a file or in a sandboxed frame; only the pattern * allows pages without an origin"
	case listed:
		remedy = "list the page's origin in Options.AllowedOrigins; the server's own has to be listed, too"
	default:
		remedy = "list the page's origin in Options.AllowedOrigins; if the page is of this host, the proxy must pass Host on; " +
			"nginx: proxy_set_header Host $http_host;"
	}
	return why, append(args, "remedy", remedy)
}

// nullOrigin is the Origin of files and sandboxed frames, and after some redirects.
const nullOrigin = "null"

// originText returns the scheme and the host of an Origin header for a log line.
func originText(origins []string) string {
	if len(origins) != 1 {
		return fmt.Sprintf("%d headers", len(origins))
	}
	if origins[0] == nullOrigin {
		return nullOrigin
	}
	u, err := url.Parse(origins[0])
	if err != nil || u.Scheme == "" || u.Host == "" {
		return "malformed"
	}
	return redact.Printable(u.Scheme + "://" + u.Host)
}

// hostText returns a host that a client has sent for a log line.
func hostText(host string) string {
	if at := strings.LastIndexByte(host, '@'); at >= 0 {
		host = host[at+1:]
	}
	if end := strings.IndexAny(host, "/?#"); end >= 0 {
		host = host[:end]
	}
	return redact.Printable(host)
}

// pattern is one parsed entry of Options.AllowedOrigins. Scheme and host are lower case.
type pattern struct {
	any    bool   // "*"
	scheme string // "": http and https
	sub    bool   // only subdomains of host match
	host   string
	port   string // "": the default port of the scheme; "*": any
}

// sameHost accepts a request if its Origin is the host that it was sent to, or if it has
// no Origin: browsers always send one. Browsers leave out the default port of the scheme
// in both headers, but some proxies add it to Host.
func sameHost(r *http.Request) bool {
	origins := r.Header["Origin"]
	if len(origins) == 0 {
		return true
	}
	if len(origins) > 1 {
		return false // no browser does that
	}
	u, err := url.Parse(origins[0])
	if err != nil || u.Host == "" {
		return false
	}
	own := ":" + defaultPort(strings.ToLower(u.Scheme))
	if own == ":" {
		return strings.EqualFold(u.Host, r.Host)
	}
	return strings.EqualFold(strings.TrimSuffix(u.Host, own), strings.TrimSuffix(r.Host, own))
}

// Compile returns a function that reports whether the Origin of a request matches one of
// the patterns. It accepts requests without an Origin, because browsers always send one.
// The host of the request must be listed like any other, because the client chooses it.
// If there are no patterns, the Origin must be the host of the request.
func Compile(patterns []string) (func(*http.Request) bool, error) {
	if len(patterns) == 0 {
		return sameHost, nil
	}
	compiled := make([]pattern, len(patterns))
	for i, text := range patterns {
		p, err := parsePattern(text)
		if err != nil {
			return nil, fmt.Errorf("%w: AllowedOrigins[%d] is %q: %w", errs.InvalidOptions, i, text, err)
		}
		compiled[i] = p
	}
	return func(r *http.Request) bool { return allowed(compiled, r.Header["Origin"]) }, nil
}

// allowed reports whether the values of an Origin header match one of the patterns.
func allowed(patterns []pattern, origins []string) bool {
	if len(origins) == 0 {
		return true
	}
	if len(origins) > 1 {
		return false // no browser does that
	}
	o, ok := parseOrigin(origins[0])
	for _, p := range patterns {
		if p.any || ok && p.matches(o) {
			return true
		}
	}
	return false
}

// origin is the parsed value of an Origin header, in lower case.
type origin struct {
	scheme, host, port string // port "": the default port of the scheme
}

// parseOrigin parses scheme "://" host [":" port]. It returns false for anything else,
// including "null".
func parseOrigin(s string) (o origin, ok bool) {
	u, err := url.Parse(strings.ToLower(s))
	if err != nil || u.Scheme+"://"+u.Host != strings.ToLower(s) || strings.HasSuffix(u.Host, ":") {
		return origin{}, false
	}
	o = origin{scheme: u.Scheme, host: u.Hostname(), port: u.Port()}
	if o.port == defaultPort(o.scheme) {
		o.port = ""
	}
	return o, o.host != ""
}

// defaultPort returns the port that an origin of the scheme leaves out.
func defaultPort(scheme string) string {
	switch scheme {
	case "http", "ws":
		return "80"
	case "https", "wss":
		return "443"
	default:
		return ""
	}
}

func (p pattern) matches(o origin) bool {
	schemeFits := p.scheme == o.scheme || p.scheme == "" && (o.scheme == "http" || o.scheme == "https")
	portFits := p.port == o.port || p.port == "*" || o.port == "" && p.port == defaultPort(o.scheme)
	hostFits := p.host == o.host
	if p.sub {
		below, isBelow := strings.CutSuffix(o.host, "."+p.host)
		hostFits = isBelow && below != ""
	}
	return schemeFits && portFits && hostFits
}

// parsePattern parses [scheme "://"] ["*."] host [":" port | ":*"], or "*".
func parsePattern(text string) (pattern, error) {
	switch {
	case text == "*":
		return pattern{any: true}, nil
	case strings.EqualFold(text, nullOrigin):
		return pattern{}, fmt.Errorf(`pages that send it have no origin to tell them apart; only "*" allows them`)
	}
	rest := strings.ToLower(text)
	var p pattern
	if scheme, after, found := strings.Cut(rest, "://"); found {
		if !isScheme(scheme) {
			return p, fmt.Errorf("%q is no scheme", scheme)
		}
		p.scheme, rest = scheme, after
	}
	host, port, err := splitHostPort(rest)
	if err != nil {
		return p, err
	}
	p.host, p.sub = strings.CutPrefix(host, "*.")
	if err := checkHost(p.host); err != nil {
		return p, err
	}
	if p.sub && net.ParseIP(p.host) != nil {
		return p, fmt.Errorf("an address has no subdomains")
	}
	if p.port = port; p.scheme != "" && port == defaultPort(p.scheme) {
		p.port = ""
	}
	return p, nil
}

// splitHostPort splits host [":" port] and checks the port. An IPv6 host must be in
// brackets.
func splitHostPort(s string) (host, port string, err error) {
	host = s
	colon := strings.LastIndexByte(s, ':')
	if colon > strings.LastIndexByte(s, ']') {
		host, port = s[:colon], s[colon+1:]
		if n, err := strconv.ParseUint(port, 10, 16); port != "*" && (err != nil || n == 0 || strconv.FormatUint(n, 10) != port) {
			return "", "", fmt.Errorf("%q is no port", port)
		}
	}
	if inner, bracketed := strings.CutPrefix(host, "["); bracketed {
		inner, bracketed = strings.CutSuffix(inner, "]")
		if !bracketed || net.ParseIP(inner) == nil || !strings.Contains(inner, ":") {
			return "", "", fmt.Errorf("%q is no IPv6 address", host)
		}
		return inner, port, nil
	}
	if strings.Contains(host, ":") {
		return "", "", fmt.Errorf("an IPv6 address needs brackets")
	}
	return host, port, nil
}

// checkHost returns an error if the host is invalid. A leading "*." has been removed.
func checkHost(host string) error {
	if host == "" {
		return fmt.Errorf("no host")
	}
	if strings.Contains(host, ":") { // an IPv6 address, checked already
		return nil
	}
	for _, r := range host {
		switch {
		case r == '*':
			return fmt.Errorf(`a "*" may stand alone, as "*." before a host, or for the port`)
		case r > 0x7f:
			return fmt.Errorf("a host is written as browsers send it (xn--…)")
		case r != '-' && r != '.' && r != '_' && !isAlphanumeric(r):
			return fmt.Errorf("%q cannot be in a host; a pattern has no path", r)
		}
	}
	if strings.HasPrefix(host, ".") || strings.Contains(host, "..") {
		return fmt.Errorf("an empty label in the host")
	}
	return nil
}

// isScheme reports whether s, in lower case, is a URL scheme.
func isScheme(s string) bool {
	for i, r := range s {
		if (i == 0 && (r < 'a' || r > 'z')) || (r != '+' && r != '-' && r != '.' && !isAlphanumeric(r)) {
			return false
		}
	}
	return s != ""
}

// isAlphanumeric reports whether r is a digit or a lower-case letter of ASCII.
func isAlphanumeric(r rune) bool { return r >= 'a' && r <= 'z' || r >= '0' && r <= '9' }
