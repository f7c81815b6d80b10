// The timestamp authority as its own command starts it, without the metrics server: its port,
// 2112, cannot be chosen, so two authorities could not run beside each other.
package main

import (
	"flag"
	"log"
	"time"

	"github.com/sigstore/timestamp-authority/v2/pkg/server"
	"github.com/spf13/viper"
)

func main() {
	port := flag.Int("port", 0, "the port of loopback to listen on")
	key := flag.String("key", "", "the file with the signing key")
	chain := flag.String("chain", "", "the file with the certificates")
	flag.Parse()
	for name, value := range map[string]any{
		"timestamp-signer":            "file",
		"timestamp-signer-hash":       "sha256",
		"file-signer-key-path":        *key,
		"certificate-chain-path":      *chain,
		"enforce-intermediate-eku":    true,
		"max-request-body-size":       1 << 20,
		"default-policy-oid":          "1.3.6.1.4.1.57264.2",
		"accepted-policy-oids":        []string{"1.3.6.1.4.1.57264.2"},
		"http-request-id-header-name": "X-Request-ID",
	} {
		viper.Set(name, value)
	}
	const timeout = 30 * time.Second
	api := server.NewRestAPIServer("127.0.0.1", *port, []string{"http"}, false, timeout, timeout)
	if err := api.Serve(); err != nil {
		log.Fatal(err)
	}
}
