package redistest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// Files of a server that listens for TLS, in its directory.
const (
	caFile   = "ca.pem"
	certFile = "cert.pem"
	keyFile  = "key.pem"
)

// authority is the certificate authority of one server.
type authority struct {
	file string // in PEM
	pool *x509.CertPool
}

// newAuthority makes an authority and a certificate for 127.0.0.1 in dir.
func newAuthority(dir string) (*authority, error) {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	ca := certificate(1, "redistest authority")
	ca.IsCA, ca.BasicConstraintsValid, ca.KeyUsage = true, true, x509.KeyUsageCertSign
	cert := certificate(2, "redistest")
	cert.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
	cert.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}

	caDER, errCA := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	certDER, errCert := x509.CreateCertificate(rand.Reader, cert, ca, &key.PublicKey, caKey)
	keyDER, errKey := x509.MarshalECPrivateKey(key)
	if err := errors.Join(errCA, errCert, errKey); err != nil {
		return nil, err
	}
	a := &authority{file: filepath.Join(dir, caFile), pool: x509.NewCertPool()}
	signed, err := x509.ParseCertificate(caDER)
	if err != nil {
		return nil, err
	}
	a.pool.AddCert(signed)
	return a, errors.Join(
		writePEM(a.file, "CERTIFICATE", caDER),
		writePEM(filepath.Join(dir, certFile), "CERTIFICATE", certDER),
		writePEM(filepath.Join(dir, keyFile), "EC PRIVATE KEY", keyDER),
	)
}

func certificate(serial int64, name string) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
	}
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

func tlsArgs(port int) []string {
	return []string{
		"--tls-port", strconv.Itoa(port), "--tls-cert-file", certFile, "--tls-key-file", keyFile,
		"--tls-ca-cert-file", caFile, "--tls-auth-clients", "no",
	}
}

// TLSAddr returns the address for TLS. It stays the same over restarts. Needs WithTLS.
func (s *Server) TLSAddr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.tls)) }

// TLS returns the configuration of a client that trusts the server. Needs WithTLS.
func (s *Server) TLS() *tls.Config {
	return &tls.Config{RootCAs: s.ca.pool, ServerName: "127.0.0.1", MinVersion: tls.VersionTLS12}
}

// CAFile returns the path of the authority's certificate. Needs WithTLS.
func (s *Server) CAFile() string { return s.ca.file }

// URL returns the server's address for redis.ParseURL, for a user. Needs WithTLS.
func (s *Server) URL(user, password string) string {
	u := url.URL{Scheme: "rediss", User: url.UserPassword(user, password), Host: s.TLSAddr(), Path: "/0"}
	return u.String()
}
