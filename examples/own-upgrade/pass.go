package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

const (
	passCookie = "desk"
	passLife   = 12 * time.Hour
	maxName    = 40 // bytes
)

// errPass is the error for any invalid pass. The client does not learn the reason.
var errPass = errors.New("no valid pass")

// passes issues and checks signed names, NAME.EXPIRY.SIGNATURE. Instances with the same
// key need no shared table. A real app uses its session store, or a token of an identity
// provider.
type passes struct{ key []byte }

func (p passes) issue(name string, now time.Time) string {
	signed := base64.RawURLEncoding.EncodeToString([]byte(name)) + "." + strconv.FormatInt(now.Add(passLife).Unix(), 10)
	return signed + "." + p.sign(signed)
}

// holder returns the name on the pass that a request carries.
func (p passes) holder(r *http.Request, now time.Time) (name string, err error) {
	cookie, err := r.Cookie(passCookie)
	if err != nil {
		return "", errPass
	}
	dot := strings.LastIndexByte(cookie.Value, '.')
	if dot < 0 || !hmac.Equal([]byte(cookie.Value[dot+1:]), []byte(p.sign(cookie.Value[:dot]))) {
		return "", errPass
	}
	// The signature is valid, so issue has written it. Parse nothing before this check.
	encoded, expiry, _ := strings.Cut(cookie.Value[:dot], ".")
	until, err := strconv.ParseInt(expiry, 10, 64)
	if err != nil || now.Unix() >= until {
		return "", errPass
	}
	data, err := base64.RawURLEncoding.DecodeString(encoded)
	if err != nil || !validName(string(data)) {
		return "", errPass
	}
	return string(data), nil
}

func (p passes) sign(text string) string {
	mac := hmac.New(sha256.New, p.key)
	mac.Write([]byte(text))
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

func validName(name string) bool {
	return name != "" && len(name) <= maxName && utf8.ValidString(name) && !strings.ContainsFunc(name, unicode.IsControl)
}
