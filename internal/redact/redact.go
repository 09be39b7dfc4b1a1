// Package redact prepares texts of clients and errors for log lines: on one line, short,
// and without credentials.
package redact

import (
	"encoding/base64"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	// leastSecret is the minimum length in bytes at which a value of a header or query
	// counts as a secret, and leastSegment that of a part of a path. Shorter values are
	// too common.
	leastSecret  = 4
	leastSegment = 16
	// mostError is the number of bytes of an error that are searched, and mostSecrets
	// the number of values of a request that are searched for. The error is not shown
	// if the request has more values, so that the cost of a refused request is bounded.
	mostError   = 2 << 10
	mostSecrets = 512
	hidden      = "[hidden]"
)

// openHeaders are request headers that contain no secrets.
var openHeaders = []string{
	"Accept", "Accept-Encoding", "Accept-Language", "Cache-Control", "Connection", "Content-Type", "Forwarded", "Origin",
	"Dnt", "Pragma", "Priority", "Sec-Ch-Ua", "Sec-Ch-Ua-Mobile", "Sec-Ch-Ua-Platform",
	"Sec-Fetch-Dest", "Sec-Fetch-Mode", "Sec-Fetch-Site", "Sec-Fetch-User", "Sec-Gpc",
	"Sec-Websocket-Extensions", "Sec-Websocket-Version", "Upgrade", "User-Agent", "Via",
	"X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Port", "X-Forwarded-Proto", "X-Forwarded-Scheme", "X-Forwarded-Ssl",
	"X-Real-Ip",
}

var (
	inQuery    = regexp.MustCompile(`\?[^\s"'?]+`)
	inUserinfo = regexp.MustCompile(`//[^/\s"']*@`)
	inPair     = regexp.MustCompile(`(?i)\b(password|passwd|pwd|secret|token|access_token|refresh_token|api_?key)=[^\s&;,]+`)
)

// WithoutSecrets returns the text of an error about a request for the log. It removes
// queries and user names of URLs, passwords and the like in name=value pairs, and
// values from the request. known are values that are not secret.
func WithoutSecrets(text string, r *http.Request, known []string) string {
	if len(text) > mostError {
		// The last word may be a part of a secret.
		text = text[:mostError]
		text = text[:strings.LastIndexFunc(text, unicode.IsSpace)+1] + "…"
	}
	secrets := secretsOf(r, known)
	if len(secrets) > mostSecrets {
		return "[hidden: the request holds too many values]"
	}
	// Longer secrets first, because one may be a part of another.
	slices.SortFunc(secrets, func(a, b string) int { return len(b) - len(a) })
	for _, secret := range secrets {
		text = strings.ReplaceAll(text, secret, hidden)
	}
	text = inQuery.ReplaceAllString(text, "?"+hidden)
	text = inPair.ReplaceAllString(text, "$1="+hidden)
	return OneLine(inUserinfo.ReplaceAllString(text, "//"+hidden+"@"))
}

// formsIn returns the forms in which a value may appear in the text of an error: as
// sent, decoded, escaped for a URL, and quoted.
func formsIn(value string) []string {
	forms := []string{value, url.QueryEscape(value), url.PathEscape(value)}
	for _, decode := range []func(string) (string, error){
		url.QueryUnescape, url.PathUnescape, decodeBase64(base64.StdEncoding), decodeBase64(base64.URLEncoding),
	} {
		if decoded, err := decode(value); err == nil {
			forms = append(forms, decoded)
		}
	}
	for _, form := range forms {
		quoted := strconv.Quote(form)
		forms = append(forms, quoted[1:len(quoted)-1])
	}
	slices.Sort(forms)
	return slices.Compact(forms)
}

// decodeBase64 returns a decoder that ignores padding and accepts only text.
func decodeBase64(e *base64.Encoding) func(string) (string, error) {
	return func(value string) (string, error) {
		decoded, err := e.WithPadding(base64.NoPadding).DecodeString(strings.TrimRight(value, "="))
		if err == nil && (len(decoded) < leastSegment/2 || !utf8.Valid(decoded)) {
			err = base64.CorruptInputError(0)
		}
		return string(decoded), err
	}
}

// secretsOf returns the values of a request that may be credentials, whole and in
// parts, in all forms, without known values. It stops beyond mostSecrets.
func secretsOf(r *http.Request, known []string) (secrets []string) {
	// Longer values cannot be in the text in any form.
	const longest = 3 * mostError
	seen := make(map[string]bool)
	keep := func(value string, least int) {
		if len(value) < least || len(value) > longest || len(secrets) > mostSecrets || seen[value] || slices.Contains(known, value) {
			return
		}
		seen[value] = true
		for _, form := range formsIn(value) {
			if len(form) >= least {
				secrets = append(secrets, form)
			}
		}
	}
	add := func(values ...string) {
		for _, v := range values {
			keep(v, leastSecret)
			for part := range strings.FieldsFuncSeq(v, separates) { // of a JWT, or of a URL
				keep(part, leastSegment)
			}
		}
	}
	for name, values := range r.Header {
		if slices.Contains(openHeaders, name) {
			continue
		}
		for _, value := range values {
			add(value)
			add(partsOf(name, value)...)
		}
	}
	if user, password, ok := r.BasicAuth(); ok {
		add(user+":"+password, password)
	}
	if r.URL == nil {
		return secrets
	}
	for _, values := range r.URL.Query() {
		add(values...)
	}
	add(valuesIn(r.URL.RawQuery, "&")...)
	for _, path := range []string{r.URL.Path, r.URL.EscapedPath()} {
		for segment := range strings.SplitSeq(path, "/") {
			if len(segment) >= leastSegment {
				add(segment)
			}
		}
	}
	return secrets
}

// separates reports whether a character separates the parts of a value.
func separates(r rune) bool { return strings.ContainsRune(".,;&=?/ \"'", r) }

// partsOf returns the parts of a header value that may be secrets.
func partsOf(name, value string) (parts []string) {
	switch name {
	case "Cookie":
		return valuesIn(value, ";")
	case "Authorization", "Proxy-Authorization":
		_, credentials, _ := strings.Cut(value, " ") // the scheme is not secret
		return []string{strings.TrimSpace(credentials)}
	}
	for part := range strings.SplitSeq(value, ",") {
		parts = append(parts, strings.TrimSpace(part))
	}
	return parts
}

// valuesIn returns the values of name=value pairs.
func valuesIn(pairs, separator string) (values []string) {
	for pair := range strings.SplitSeq(pairs, separator) {
		_, value, _ := strings.Cut(pair, "=")
		values = append(values, strings.Trim(value, ` "`))
	}
	return values
}
