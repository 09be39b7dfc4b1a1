package mesh

import (
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
)

// originPattern is one of Options.AllowedOrigins, taken apart. Scheme and host
// are lower case.
type originPattern struct {
	any    bool   // "*"
	scheme string // "": http and https
	sub    bool   // the host is below host, not host itself
	host   string
	port   string // "": the scheme's own; "*": any
}

// sameHost accepts requests whose Origin is the host that they were sent to,
// and those without one, which no browser sends.
func sameHost(r *http.Request) bool {
	origins := r.Header["Origin"]
	if len(origins) == 0 {
		return true
	}
	u, err := url.Parse(origins[0])
	return err == nil && u.Host != "" && strings.EqualFold(u.Host, r.Host)
}

// compileOrigins returns what Upgrader.CheckOrigin is to be: sameHost for an
// empty list, else a function that accepts requests whose Origin one of the patterns matches, and those without
// an Origin, which no browser sends. The request's own host has to be listed
// like any other: it is what the client says it is.
func compileOrigins(patterns []string) (func(*http.Request) bool, error) {
	if len(patterns) == 0 {
		return sameHost, nil
	}
	compiled := make([]originPattern, len(patterns))
	for i, text := range patterns {
		p, err := parseOriginPattern(text)
		if err != nil {
			return nil, fmt.Errorf("%w: AllowedOrigins[%d] is %q: %w", ErrInvalidOptions, i, text, err)
		}
		compiled[i] = p
	}
	return func(r *http.Request) bool { return originAllowed(compiled, r.Header["Origin"]) }, nil
}

// originAllowed matches the values of a request's Origin header.
func originAllowed(patterns []originPattern, origins []string) bool {
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

// origin is the value of an Origin header, taken apart; lower case.
type origin struct {
	scheme, host, port string // port "": the scheme's own
}

// parseOrigin takes apart scheme "://" host [":" port]. Anything else, "null"
// included, is not ok.
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

// defaultPort is the port that an origin of that scheme leaves out.
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

func (p originPattern) matches(o origin) bool {
	schemeFits := p.scheme == o.scheme || p.scheme == "" && (o.scheme == "http" || o.scheme == "https")
	portFits := p.port == o.port || p.port == "*" || o.port == "" && p.port == defaultPort(o.scheme)
	hostFits := p.host == o.host
	if p.sub {
		below, isBelow := strings.CutSuffix(o.host, "."+p.host)
		hostFits = isBelow && below != ""
	}
	return schemeFits && portFits && hostFits
}

// parseOriginPattern takes apart [scheme "://"] ["*."] host [":" port | ":*"],
// or "*". Its errors say what is wrong with it.
func parseOriginPattern(text string) (originPattern, error) {
	if text == "*" {
		return originPattern{any: true}, nil
	}
	rest := strings.ToLower(text)
	var p originPattern
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
	if err := checkOriginHost(p.host); err != nil {
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

// splitHostPort splits host [":" port], where an IPv6 host is in brackets, and
// checks the port.
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

// checkOriginHost says what is wrong with a host, its leading "*." removed.
func checkOriginHost(host string) error {
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

// isAlphanumeric is about ASCII in lower case.
func isAlphanumeric(r rune) bool { return r >= 'a' && r <= 'z' || r >= '0' && r <= '9' }
